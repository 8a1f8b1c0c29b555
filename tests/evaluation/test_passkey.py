import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, is_uncompressed

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.passkey import DEPTHS, make_prompts, passkey, passkey_texts, prompt_lengths
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.names import given_cache

Maker = Callable[..., Subject]


@pytest.mark.parametrize("length", [160, 257, 512])
def test_prompts_are_what_they_should_be(length: int, subject: Maker) -> None:
    made = subject()
    prompts = make_prompts(made, length, per_cell=3, seed=0)
    assert [prompt.depth for prompt in prompts] == [depth for depth in DEPTHS for _ in range(3)]
    for prompt in prompts:
        assert (prompt.ids.shape, prompt.ids.dtype) == ((length,), torch.int64)
        text = made.tokenizer.decode(prompt.ids)
        needle, question, _ = passkey_texts(prompt.key)
        assert re.fullmatch(r"\d{5}", prompt.key)
        assert (text.count(needle), text.endswith(question)) == (1, True)
        room = length - len(needle) - len(question)
        assert text.index(needle) == round(prompt.depth * room)
        assert text.replace(needle, "").removesuffix(question) in made.text


def test_prompts_follow_the_seed_and_differ(subject: Maker) -> None:
    made = subject()
    first, again, other = (make_prompts(made, 256, 4, seed) for seed in (0, 0, 1))
    assert [p.key for p in first] == [p.key for p in again] != [p.key for p in other]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert len({p.key for p in first}) == len(first)
    longer = make_prompts(made, 257, 4, 0)
    assert not {p.key for p in first} & {p.key for p in longer}


def test_a_prompt_starts_as_the_model_expects(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject()
    monkeypatch.setattr("pqkv_cli.evaluation.passkey.prefix_ids", lambda tokenizer: [tokenizer.bos_token_id])
    for prompt in make_prompts(made, 200, 1, 0):
        assert (len(prompt.ids), int(prompt.ids[0]), int((prompt.ids == 0).sum())) == (200, 0, 1)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (300, [300]),
        (512, [512]),
        (767, [512]),
        (768, [512, 768]),
        (1100, [512, 1024]),
        (4096, [512, 1024, 2048, 4096]),
        (8176, [512, 1024, 2048, 4096, 8176]),
    ],
)
def test_lengths(longest: int, expected: list[int]) -> None:
    assert prompt_lengths(longest) == expected


def test_prompts_that_cannot_be_made(subject: Maker) -> None:
    with pytest.raises(DataError, match=r"1020 tokens and 7 tokens of answer exceed the model's 1024 positions.*1017 or less"):
        make_prompts(subject(), 1020, 1, 0)
    with pytest.raises(DataError, match=r"40 tokens is too short: needle and question take \d+; use --context \d+ or more"):
        make_prompts(subject(), 40, 1, 0)
    with pytest.raises(DataError, match=r"the text has 20: choose a smaller --context"):
        make_prompts(subject(text="a" * 20), 512, 1, 0)


def test_right_and_wrong_answers_are_told_apart(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed side repeats the key it was shown; the compressed side forgets needles in the front half."""
    made, tokenizer = subject(), byte_tokenizer()

    def answer(row: torch.Tensor, forgets: bool) -> list[int]:
        text = tokenizer.decode(row)
        found = re.search(r"The pass key is (\d{5})\. Remember", text)
        assert found is not None
        key = "99999" if forgets and found.start() < len(text) // 4 else found[1]
        return tokenizer(f" {key}.").input_ids

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert (options["do_sample"], bool(options["attention_mask"].all())) == (False, True)
        rows = [answer(row, not is_uncompressed(given_cache(options))) for row in ids]
        return torch.cat((ids, torch.tensor(rows)), dim=1)

    monkeypatch.setattr(made.model, "generate", generate)
    outcome = passkey(made, EvaluationSettings("all", context=512, limit=2), lambda done, total: None)
    metrics = outcome.metrics
    right = {cell["depth"]: cell["quantized"] for cell in metrics["grid"]}
    assert right == {0.0: 0, 0.25: 0, 0.5: 1, 0.75: 1, 1.0: 1}
    assert {cell["baseline"] for cell in metrics["grid"]} == {1.0}
    assert metrics["accuracy"].items() >= {"baseline": 1.0, "quantized": 0.6, "recovery": 0.6}.items()
    assert metrics["accuracy@512"]["quantized"] == 0.6
    low, high = metrics["accuracy"]["ci95"]
    assert 0 <= low <= 0.6 <= high <= 1
    assert outcome.num_tokens == 10 * 512


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_a_model_that_knows_nothing_has_no_recovery(mode: str, subject: Maker) -> None:
    settings = EvaluationSettings(mode, context=256, limit=1)  # type: ignore[arg-type]
    outcome = passkey(subject(), settings, lambda done, total: None)
    assert outcome.metrics["accuracy"] == {"baseline": 0.0, "quantized": 0.0, "recovery": None, "ci95": None}
    assert outcome.bits.asymptotic == 4
    assert outcome.bits.num_tokens == (0 if mode == "all" else 256 + 6)
