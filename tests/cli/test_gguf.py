"""A GGUF file through the command line: wherever a model is named, a file may be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import vocabulary, write_gguf

from pqkv_cli.recipe_files import load_recipe

SMALL = ("--samples", 32, "--seq-len", 64, "--reservoir-size", 2048, "--data")


@pytest.fixture
def file(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return write_gguf(tmp_path / "Tiny v1.gguf", tiny("llama", vocab_size=len(vocabulary())), "Q8_0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word {number}" for number in range(600)))
    return path


def test_the_chain(pqkv: Callable, file: Path, text: Path, tmp_path: Path) -> None:
    inspected = pqkv("inspect", file.name, "--json", "-")
    assert inspected.json["label"] == "Tiny v1" and len(inspected.json["model"]["layers"]) == 3
    assert not (tmp_path / "home").exists()

    first = pqkv("calibrate", file.name, *SMALL, text)
    assert first.code == 0, first.err
    assert first.err.count("converting Tiny v1.gguf into safetensors, once: it lies in") == 1
    assert "de-quantizing" not in first.err and "Loading weights" not in first.err and "Writing model" not in first.err
    run = tmp_path / "runs" / "Tiny-v1"
    assert load_recipe(run / "recipe.yaml").model == str(file)

    again = pqkv("calibrate", file.name)
    assert again.code == 0 and "converting" not in again.err and "already done" in again.err
    assert pqkv("fit-codebooks", run, "--bits", 2, "--iterations", 1).code == 0
    assert pqkv("export", run).code == 0
    verified = pqkv("verify", run, "--against", file)
    assert verified.code == 0 and "are those of Tiny v1" in " ".join(verified.out.split())
    assert pqkv("inspect", run, "--json", "-").json["artifact"]["label"] == "Tiny v1"
    assert pqkv("generate", run, "word 1", "--max-new-tokens", 2).code == 0


def test_a_changed_file_is_calibrated_again(pqkv: Callable, file: Path, text: Path) -> None:
    assert pqkv("calibrate", file.name, *SMALL, text).code == 0
    raw = bytearray(file.read_bytes())
    raw[-200] ^= 1
    file.write_bytes(raw)
    again = pqkv("calibrate", file.name)
    assert again.code == 0 and "converting Tiny v1.gguf" in again.err


def test_a_recipe_takes_its_model_from_a_file(pqkv: Callable, file: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: Tiny v1.gguf\n")
    assert pqkv("calibrate", "mine.yaml", *SMALL, text).code == 0
    other = pqkv("calibrate", "llama-2-7b", "--model", file.name, *SMALL, text)
    assert other.code == 0, other.err
    assert load_recipe(tmp_path / "runs" / "llama-2-7b" / "recipe.yaml").model == str(file)


def test_what_is_no_model_is_refused_in_words(pqkv: Callable, file: Path) -> None:
    directory = file.parent / "only"
    directory.mkdir()
    moved = file.rename(directory / file.name)
    answer = pqkv("calibrate", "only")
    assert answer.code == 1 and "It holds 1 GGUF file: name the file itself, such as only/Tiny v1.gguf" in " ".join(
        answer.err.split()
    )
    moved.write_bytes(moved.read_bytes()[:-50])
    for verb in ("inspect", "calibrate"):
        answer = pqkv(verb, moved)
        assert answer.code == 1 and "is cut short" in " ".join(answer.err.split())
