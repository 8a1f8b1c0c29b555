from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chain import byte_tokenizer, is_uncompressed

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.needle import ANSWER, CUE, DEPTHS, NEEDLE, needle, needle_prompt, recalled
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.names import given_cache

Maker = Callable[..., Subject]
TEXT = "One two three. Four five six seven. Eight! " * 100


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_stands_behind_a_full_stop(depth: float) -> None:
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    ids = needle_prompt(tokenizer, TEXT, 700, depth, rng)
    text = tokenizer.decode(ids)
    assert len(ids) == 700
    assert (text.count(NEEDLE), text.endswith(CUE)) == (1, True)
    before, after = text.removesuffix(CUE).split(NEEDLE)
    assert before + after in TEXT
    room = len(before) + len(after)
    if depth == 1:
        assert after == ""
    else:
        assert before == "" or before.rstrip().endswith(".")
        assert depth * room - 50 <= len(before) <= depth * room


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (f" {ANSWER}.", 1.0),
        (f"{ANSWER.upper()} and more words", 1.0),
        ("eat a sandwich", 3 / 12),
        ("a a a a", 2 / 12),
        ("", 0.0),
        ("something else", 0.0),
    ],
)
def test_the_score_is_the_share_of_words(answer: str, share: float) -> None:
    assert recalled(answer) == pytest.approx(share)


def test_the_grid(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed side repeats the needle; the compressed side half of it."""
    made = subject(text=TEXT)

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        answer = f" {ANSWER}" if is_uncompressed(given_cache(options)) else " eat a sandwich and sit in"
        return torch.cat((ids, torch.tensor([made.tokenizer(answer).input_ids] * len(ids))), dim=1)

    monkeypatch.setattr(made.model, "generate", generate)
    outcome = needle(made, EvaluationSettings("all", context=512, limit=2), lambda done, total: None)
    cells = outcome.metrics["grid"]
    assert [(cell["length"], cell["depth"], cell["samples"]) for cell in cells] == [(512, depth, 2) for depth in DEPTHS]
    assert {(cell["baseline"], cell["quantized"]) for cell in cells} == {(1.0, 0.5)}
    assert outcome.metrics["recall"].items() >= {"baseline": 1.0, "quantized": 0.5, "recovery": 0.5}.items()
    assert outcome.metrics["recall@512"]["quantized"] == 0.5
    assert outcome.headline == ("recall",)


def test_needles_that_cannot_be_hidden(subject: Maker) -> None:
    with pytest.raises(DataError, match=r"a needle prompt of 100 tokens is too short"):
        needle(subject(text=TEXT), EvaluationSettings("all", context=100), lambda done, total: None)
    with pytest.raises(DataError, match=r"needle prompts of 1024 tokens and \d+ tokens of answer exceed the model's 1024"):
        needle(subject(text=TEXT), EvaluationSettings("all", context=1024), lambda done, total: None)
