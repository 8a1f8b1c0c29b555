"""A calibration on a machine that is too small for its batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaModel


@pytest.fixture
def line(tiny_model: Path, texts: tuple[Path, Path]) -> tuple[object, ...]:
    return "calibrate", tiny_model, "--data", texts[0], "--samples", 116, "--seq-len", 64, "--reservoir-size", 500


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Give a function that makes forward passes of more than so many windows fail, and returns the sizes that were tried."""
    forward, tried = LlamaModel.forward, []

    def limit(most: int) -> list[int]:
        def limited(self: Any, input_ids: Any = None, *words: Any, **options: Any) -> Any:
            is_window = input_ids.shape[1] == 64  # the check of rotations reads half of one
            tried.extend([len(input_ids)] * is_window)
            if is_window and len(input_ids) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes.")
            return forward(self, input_ids, *words, **options)

        monkeypatch.setattr(LlamaModel, "forward", limited)
        return tried

    return limit


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "calibration").rglob("*")) if p.is_file()}


def test_batches_are_halved_until_they_fit(pqkv: Callable, line: tuple, room_for: Callable, tmp_path: Path) -> None:
    assert pqkv(*line, "--batch-size", 2, "-o", "small").code == 0
    tried = room_for(3)
    answer = pqkv(*line, "--batch-size", 8, "-o", "halved", "--json", "-")
    assert answer.code == 0, answer.err
    assert "out of memory with 8 windows at once; calibrating again with 4, as --batch-size 4" in answer.err
    assert "out of memory with 4 windows at once; calibrating again with 2, as --batch-size 2" in answer.err
    assert (tried[:3], set(tried[3:]), answer.json["facts"]["batch_size"]) == ([8, 4, 2], {2}, 2)
    assert contents(tmp_path / "halved") == contents(tmp_path / "small")
    assert "already done" in pqkv(*line, "--batch-size", 8, "-o", "halved").err


def test_memory_that_runs_out_later(pqkv: Callable, line: tuple, room_for: Callable, tmp_path: Path) -> None:
    """Parts of the larger batches are on disk by then; none of them may stay."""
    assert pqkv(*line, "--batch-size", 2, "-o", "small").code == 0
    forward, passes = LlamaModel.forward, []

    def fails_later(self: Any, input_ids: Any = None, *words: Any, **options: Any) -> Any:
        passes.append(len(input_ids))
        if len(input_ids) == 4 and len(passes) > 20:
            raise MemoryError
        return forward(self, input_ids, *words, **options)

    LlamaModel.forward = fails_later
    try:
        answer = pqkv(*line, "--batch-size", 4, "-o", "halved")
    finally:
        LlamaModel.forward = forward
    assert (answer.code, "calibrating again with 2" in answer.err) == (0, True), answer.err
    assert contents(tmp_path / "halved") == contents(tmp_path / "small")


def test_an_interrupted_one_goes_on_with_the_smaller_batch(
    pqkv: Callable, line: tuple, room_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pqkv(*line, "--batch-size", 2, "-o", "small").code == 0
    tried = room_for(3)
    limited = LlamaModel.forward

    def interrupted(self: Any, input_ids: Any = None, *words: Any, **options: Any) -> Any:
        if tried.count(2) > 40:
            raise KeyboardInterrupt
        return limited(self, input_ids, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "forward", interrupted)
        assert pqkv(*line, "--batch-size", 4, "-o", "halved").code == 130
    tried.clear()
    answer = pqkv(*line, "--batch-size", 4, "-o", "halved")
    assert (answer.code, "going on where it stopped" in answer.err) == (0, True), answer.err
    assert set(tried) == {2} and len(tried) < 30
    assert contents(tmp_path / "halved") == contents(tmp_path / "small")


def test_one_window_too_large(pqkv: Callable, line: tuple, room_for: Callable) -> None:
    tried = room_for(0)
    answer = pqkv(*line, "--batch-size", 2, "-o", "halved")
    assert (answer.code, tried) == (1, [2, 1])
    assert "error: out of memory (DefaultCPUAllocator" in answer.err and "a smaller --batch-size, --seq-len" in answer.err
