"""Recall windows: share, length, determinism, and that what is asked was said."""

import re
from typing import Any

import pytest
import torch

from pqkv_cli.calibration.text import load_text, token_windows
from pqkv_cli.calibration.windows import LEAST_TOKENS, with_recall
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model(resolve_model("demo"), torch.float32, "cpu")[1]


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> torch.Tensor:
    return token_windows(tokenizer, load_text("stdlib:calibration")[:400_000], 16, 512, 0)


@pytest.mark.parametrize(("share", "changed"), [(0.0, 0), (0.125, 2), (0.3, 4), (1.0, 16)])
def test_the_share_of_windows_is_turned(tokenizer: Any, windows: torch.Tensor, share: float, changed: int) -> None:
    turned = with_recall(tokenizer, windows, share, 0)
    assert turned.shape == windows.shape and turned.dtype == windows.dtype
    assert int((turned != windows).any(dim=1).sum()) == changed
    assert torch.equal(turned[:, 0], windows[:, 0])  # the beginning of the sequence stays


def test_the_same_seed_gives_the_same_windows_whatever_comes_after(tokenizer: Any, windows: torch.Tensor) -> None:
    whole, first = with_recall(tokenizer, windows, 0.5, 3), with_recall(tokenizer, windows[:6], 0.5, 3)
    assert torch.equal(whole[:6], first)
    assert not torch.equal(whole, with_recall(tokenizer, windows, 0.5, 4))


def test_every_answer_was_said_before(tokenizer: Any, windows: torch.Tensor) -> None:
    checked = 0
    for row in with_recall(tokenizer, windows, 1.0, 0):
        text = tokenizer.decode(row.tolist())
        for name, value in re.findall(r"What is the code of (\w+)\? It is (\w+)\.", text):
            assert f"The code of {name} is {value}." in text
            checked += 1
    assert checked >= 4


def test_short_windows_stay_text(tokenizer: Any, windows: torch.Tensor) -> None:
    short = windows[:, : LEAST_TOKENS - 1]
    assert torch.equal(with_recall(tokenizer, short, 1.0, 0), short)


def test_evaluation_wordings_are_absent(tokenizer: Any, windows: torch.Tensor) -> None:
    text = " ".join(tokenizer.decode(row.tolist()) for row in with_recall(tokenizer, windows, 1.0, 0))
    assert "pass key" not in text
