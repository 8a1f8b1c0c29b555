"""What vectors are multiplied with before they are coded: ``key_map`` and ``value_map`` of a recipe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

QUICK = ("--iterations", 2, "--prototype-bits", 0)


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def choose(run: Path, **chosen: str | None) -> None:
    """Set maps in the run's recipe."""
    recipe = run / "recipe.yaml"
    lines = yaml.safe_load(recipe.read_text())
    lines["codebooks"] |= chosen
    recipe.write_text(yaml.safe_dump(lines, sort_keys=False))


def maps(run: Path) -> dict[str, str]:
    from pqkv_cli.artifact.store import open_artifact

    return {name: spec.map for name, spec in open_artifact(run / "artifact").header.plan.codecs.items()}


def test_maps_are_chosen_kept_and_given_up_again(pqkv: Callable, run: Path) -> None:
    assert maps(run) == {"k4": "blocks", "v4": "matrix"}
    before = (run / "artifact" / "pqkv.safetensors").read_bytes()
    choose(run, key_map="scale", value_map="identity")
    assert pqkv("fit-codebooks", run, "--bits", 4).code == 0
    assert pqkv("export", run).code == 0 and pqkv("verify", run).code == 0
    assert maps(run) == {"k4": "scale", "v4": "identity"}
    choose(run, key_map=None, value_map=None)
    answer = pqkv("export", run)
    assert answer.code == 1 and "after fit-codebooks was done, codebooks.key_map changed from scale to None" in answer.err
    assert pqkv("fit-codebooks", run).code == 0 and pqkv("export", run).code == 0
    assert (run / "artifact" / "pqkv.safetensors").read_bytes() == before


def test_a_budget_tries_rates_in_the_chosen_maps(pqkv: Callable, run: Path) -> None:
    choose(run, key_map="matrix", value_map="scale")
    answer = pqkv("fit-codebooks", run, "--budget", 1.5, "--key-space", "post_rope", *QUICK)
    assert answer.code == 0, answer.err
    codecs = json.loads((run / "codebooks" / "fit.json").read_text())["plan"]["codecs"]
    assert {(name[0], codec["map"]) for name, codec in codecs.items()} == {("k", "matrix"), ("v", "scale")}


@pytest.mark.parametrize(
    ("chosen", "words", "said"),
    [
        (
            {"value_map": "matrxi"},
            (),
            "codebooks.value_map: found 'matrxi' (did you mean 'matrix'?); expected 'identity', ",
        ),
        ({"value_map": "blocks"}, (), "codebooks.value_map: found 'blocks'; expected 'identity', 'scale' or 'matrix'"),
        ({"key_map": "matrix"}, ("--bits", 4), "codebooks.key_map is matrix; expected one of blocks, scale, identity for keys"),
        (
            {"key_map": "matrix"},
            ("--budget", 2),
            "codebooks.key_map is matrix; expected one of blocks, scale, identity for keys",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    chosen: dict[str, str], words: tuple[object, ...], said: str, pqkv: Callable, run: Path
) -> None:
    choose(run, **chosen)
    answer = pqkv("fit-codebooks", run, *words)
    assert answer.code == 2 and said in answer.err


def test_values_are_predicted_from_keys_to_the_end(pqkv: Callable, run: Path) -> None:
    """Every stage and what reads its result; without the setting all bytes are as before."""
    before = (run / "artifact" / "pqkv.safetensors").read_bytes()
    choose(run, predict_values=True)
    answer = pqkv("fit-codebooks", run, "--bits", 4)
    assert answer.code == 0 and "codebooks.predict_values changed from None to True" in answer.err
    assert pqkv("export", run).code == 0 and pqkv("verify", run).code == 0
    shown = json.loads(pqkv("inspect", run, "--json", "-").out)
    assert shown["artifact"]["predicted_layers"] == len(shown["artifact"]["layers"]) and pqkv("diff", run, run).code == 0
    made = pqkv("generate", run, "The quick", "--max-new-tokens", 3)
    assert made.code == 0, made.err
    measured = pqkv("eval", run, "--task", "perplexity", "--mode", "all", "--limit", 1, "--context", 256)
    assert measured.code == 0, measured.err
    choose(run, predict_values=False)
    assert pqkv("fit-codebooks", run).code == 0 and pqkv("export", run).code == 0
    assert (run / "artifact" / "pqkv.safetensors").read_bytes() == before


def test_a_budget_of_predicted_values(pqkv: Callable, run: Path) -> None:
    choose(run, predict_values=True)
    answer = pqkv("fit-codebooks", run, "--budget", 1.5, "--refine", *QUICK)
    assert answer.code == 0, answer.err
    codecs = json.loads((run / "codebooks" / "fit.json").read_text())["plan"]["codecs"]
    assert {(name[0], codec["predicted"]) for name, codec in codecs.items()} == {("k", False), ("v", True)}
    assert pqkv("export", run).code == 0
    answer = pqkv("eval", run, "--peers", "rtn:4", "--inject-outliers", 16, "--json", "-", "--limit", 1, "--context", 256)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    plain, gauged = (
        next(r for r in found[part] if r["method"] == "pqkv")["metrics"]["kl_bits"]["quantized"]
        for part in ("without", "with_outliers")
    )
    assert gauged == pytest.approx(plain, rel=0.01)
