"""What a calibration will take on disk is said before it begins; where that is not free it does not begin."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

WORDS = ("--samples", 20, "--seq-len", 64, "--reservoir-size", 700)


def test_it_says_what_it_keeps_and_keeps_that(
    pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    answer = pqkv("calibrate", tiny_model, "--data", texts[0], *WORDS, "-o", tmp_path / "run", "--json", "-")
    assert answer.code == 0, answer.err
    expected = 700 * 2 * 2 * (2 * 2 * 16 + 4)  # tokens, layers, heads: keys and values in fp16 and a mass in fp32
    assert f"the calibration keeps {expected / 1e6:,.0f} MB in {tmp_path / 'run' / 'calibration'}" in answer.err
    moments = 2 * 2 * 3 * 16 * 16 * 8  # two moments and what belongs to rotary pairs are not counted
    assert expected <= answer.json["facts"]["bytes"] <= expected + moments + 20 * 64 * 8 + 700 * 4 + 8192
    again = pqkv("calibrate", tiny_model, "--data", texts[0], *WORDS, "-o", tmp_path / "run")
    assert again.code == 0 and "keeps" not in again.err


@pytest.mark.parametrize("words, times", [((), 2 * 2), (("--fisher",), 2 * 2)])
def test_a_disk_that_cannot_hold_it_is_an_error_before_anything_is_written(
    pqkv: Callable,
    tiny_model: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    times: int,
) -> None:
    of_token = 2 * 2 * 16 + (12 if words else 4)
    needed = 2 * 700 * times * of_token
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    answer = pqkv("calibrate", tiny_model, "--data", texts[0], *WORDS, *words, "-o", tmp_path / "run")
    assert answer.code == 1
    assert f"needs {needed:,} bytes while it is written" in answer.err and f"{needed - 1:,} are free" in answer.err
    assert "--reservoir-size" in answer.err
    assert not list((tmp_path / "run").rglob("*.safetensors"))
