"""``fit-codebooks --refine`` from the command line: what it changes, what it says, and what it leaves alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pqkv_cli.pipeline.rundir import Run


@pytest.fixture
def text(texts: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(texts[0].read_text()[:6000])
    return path


@pytest.fixture
def calibrated(tiny_model: Path, text: Path, pqkv: Callable) -> Path:
    assert pqkv("calibrate", tiny_model, "-o", "run", "--data", text, "--samples", 20, "--seq-len", 48).code == 0
    return Path("run")


def fitted(pqkv: Callable, run: Path, *words: str) -> dict:
    answer = pqkv("fit-codebooks", run, "--bits", 2, "--prototype-bits", 0, "--iterations", 2, *words, "--json", "-")
    assert answer.code == 0, answer.err
    return answer.json["facts"]


def test_what_refining_did_reaches_the_artifact_or_is_said(calibrated: Path, pqkv: Callable) -> None:
    facts = fitted(pqkv, calibrated, "--refine")
    outcome = json.loads((calibrated / "codebooks" / "refinement.json").read_text())
    assert facts["refined"] is outcome["is_better"]
    assert pqkv("export", calibrated).code == 0
    source = calibrated / "codebooks" / ("refined" if facts["refined"] else ".")
    stored, exported = load_file(source / "layer_000.safetensors"), load_file(Run(calibrated).artifact_file)
    books = [tensor for name, tensor in stored.items() if "codebooks" in name]
    assert all(any(b.shape == e.shape and b.equal(e) for e in exported.values()) for b in books)


def test_it_is_done_once_and_undone_by_its_opposite(calibrated: Path, pqkv: Callable) -> None:
    fitted(pqkv, calibrated, "--refine")
    layer = calibrated / "codebooks" / "layer_000.safetensors"
    before = layer.read_bytes()
    again = pqkv("fit-codebooks", calibrated)
    assert again.code == 0 and "already done" in again.err
    facts = fitted(pqkv, calibrated, "--no-refine")
    assert "refined" not in facts and not (calibrated / "codebooks" / "refinement.json").exists()
    assert layer.read_bytes() == before


def test_other_text_than_was_calibrated_on_is_refused(calibrated: Path, text: Path, pqkv: Callable) -> None:
    text.write_text(text.read_text().replace("dog", "cow"))
    answer = pqkv("fit-codebooks", calibrated, "--bits", 2, "--refine")
    assert answer.code == 1 and "not the text that the run was calibrated on" in answer.err
