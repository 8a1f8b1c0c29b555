"""``pqkv eval --peers`` and ``--inject-outliers`` on a tiny run."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, to be changed at will."""
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


@pytest.fixture
def words(run: Path, texts: tuple[Path, Path]) -> list[object]:
    return ["eval", run, "--data", texts[1], "--context", 64, "--limit", 2]


def test_one_table_one_picture_and_the_numbers(
    pqkv: Callable[..., Any], run: Path, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = pqkv(*words, "--task", "perplexity", "--peers", "rtn:4,kivi:2", "--also", run)
    assert answer.code == 0, answer.err
    out, err = answer.out, answer.err
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [["rtn", "4", "5.000"], ["pqkv", "4", "4.000"], ["pqkv (RUN)", "4", "4.000"], ["kivi", "2", "3.000"]]
    assert "every key and value quantized, uncompressed perplexity" in out
    folder = run / "results" / "peers"
    assert f"wrote {folder / 'pareto.json'}" in err and f"wrote {folder / 'pareto.png'}" in err
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.stem for path in folder.glob("*.json")} == {"pqkv", "pqkv-RUN", "rtn-4", "kivi-2", "pareto"}
    record = json.loads((folder / "kivi-2.json").read_text())
    assert (record["schema"], record["method"], record["native_bits"]) == ("pqkv.result/1", "kivi", 2)
    assert len(json.loads((folder / "pareto.json").read_text())["points"]) == 4
    # Results of rivals are no results of the artifact: its own evaluation still finds only its own.
    assert list((run / "results").glob("*.json")) == []


def test_what_nothing_can_attend_to_is_marked(pqkv: Callable[..., Any], words: list[object]) -> None:
    answer = pqkv(*words, "--peers", "higgs:4,aqua-kv:4")
    assert answer.code == 0, answer.err
    names = [line.split("│")[1].strip() for line in answer.out.splitlines() if line.startswith("│")]
    assert sorted(names) == ["aqua-kv (at rest)", "higgs", "pqkv"]


def test_json_of_a_comparison_is_its_records(pqkv: Callable[..., Any], words: list[object]) -> None:
    answer = pqkv(*words, "--peers", "turboquant:2", "--json", "-")
    assert answer.code == 0, answer.err
    assert [r["method"] for r in answer.json] == ["pqkv", "turboquant"]


def test_without_matplotlib_the_install_line_is_said_before_anything_is_measured(
    pqkv: Callable[..., Any], run: Path, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    answer = pqkv(*words, "--peers", "rtn:4")
    assert answer.code == 2
    assert "expected matplotlib 3.8 or newer: pip install 'matplotlib>=3.8'" in answer.err.replace("\n", " ")
    assert not (run / "results" / "peers").exists()


def test_a_named_rival_without_a_result_fails_the_command(
    pqkv: Callable[..., Any], words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    answer = pqkv(*words, "--peers", "quanto:4,rtn:4")
    assert answer.code == 1
    assert "│ rtn" in answer.out
    assert "without a result: quanto:4: quanto: found no package" in answer.err
    assert "the comparison is incomplete: no result for quanto:4" in answer.err


def test_outliers_leave_us_and_hurt_others(pqkv: Callable[..., Any], run: Path, words: list[object]) -> None:
    answer = pqkv(*words, "--inject-outliers", 16, "--peers", "million:2,rtn:4")
    assert answer.code == 0, answer.err
    assert "uncompressed logits are bit for bit the same" in answer.out
    test = json.loads((run / "results" / "peers" / "outliers.json").read_text())
    assert test["largest_logit_difference"] == 0
    kl = [[r["metrics"]["kl_bits"]["quantized"] for r in test[side]] for side in ("without", "with_outliers")]
    assert kl[0][0] == kl[1][0]
    assert kl[1][1] > kl[0][1] and kl[1][2] > kl[0][2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "kivvi"], "--peers names 'kivvi' (did you mean 'kivi'?)"),
        (
            ["--peers", "all", "--task", "passkey"],
            "found --task passkey beside --peers; rivals run the task perplexity in mode",
        ),
        (["--peers", "all", "--mode", "cache"], "found --mode cache beside --peers"),
        (["--peers", "all", "--max-kld", "0.1"], "found a gate beside --peers"),
        (["--also", "x"], "found --also without --peers"),
        (["--inject-outliers", "16", "--also", "x"], "found --also beside --inject-outliers"),
        (["--inject-outliers", "3"], "the outlier scale is 3; expected a power of two"),
    ],
)
def test_what_does_not_go_together_is_misuse(
    more: list[str], message: str, pqkv: Callable[..., Any], words: list[object]
) -> None:
    answer = pqkv(*words, *more)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err.replace("\n", " ")


def test_a_lone_artifact_has_no_samples_for_rivals(pqkv: Callable[..., Any], run: Path, words: list[object]) -> None:
    words[1] = run / "artifact"
    answer = pqkv(*words, "--peers", "rtn:4")
    assert answer.code == 2
    assert "is a lone artifact; rivals are calibrated on the same samples as ours" in answer.err
