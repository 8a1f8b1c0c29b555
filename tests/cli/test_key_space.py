"""Where keys with rotary embedding are coded: ``--key-space``."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

QUICK = ("--iterations", 2, "--prototype-bits", 0)


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def codecs(run: Path) -> dict[str, str | None]:
    from pqkv_cli.artifact.store import open_artifact

    return {name: spec.key_space for name, spec in open_artifact(run / "artifact").header.plan.codecs.items()}


def test_keys_after_rotary_embedding_are_fitted_written_and_read(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    assert pqkv("fit-codebooks", run, "--bits", 4, "--key-space", "post_rope", *QUICK).code == 0
    assert pqkv("export", run).code == 0
    assert codecs(run) == {"k4_post": "post_rope", "v4": None}
    assert pqkv("verify", run).code == 0
    answer = pqkv(
        *("eval", run, "--task", "perplexity", "--mode", "all", "--mode", "cache", "--data", texts[1]),
        *("--context", 320, "--limit", 2, "--json", "-"),
    )
    assert answer.code == 0, answer.err
    costs = {record["mode"]: record["metrics"]["kl_bits"]["quantized"] for record in answer.json}
    assert 0 < costs["cache"] < costs["all"] < 0.5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("measured", "found 'measured', which was removed: wherever it was measured, every layer chose pre_rope; expected"),
        ("pre-rope", "(did you mean 'pre_rope'?); expected 'pre_rope' or 'post_rope'"),
    ],
)
def test_another_space_is_refused(word: str, said: str, pqkv: Callable, run: Path) -> None:
    answer = pqkv("fit-codebooks", run, "--key-space", word)
    assert answer.code == 2 and said in answer.err


def test_a_run_whose_recipe_asks_for_what_was_removed_says_so(pqkv: Callable, run: Path) -> None:
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("key_space: pre_rope", "key_space: measured"))
    answer = pqkv("export", run)
    assert answer.code == 2 and f"{file} is not a valid recipe" in answer.err and "which was removed" in answer.err
