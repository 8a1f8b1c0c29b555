"""A model writes its own text: many openings, reproducible, in its template, and never the same over and over."""

import random
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, quiet, tiny_llama
from transformers import PreTrainedTokenizerFast

from pqkv_cli.calibration import writing
from pqkv_cli.calibration.openings import KINDS, Opening, dealt
from pqkv_cli.calibration.text import load_text, token_windows
from pqkv_cli.calibration.windows import mixed_windows
from pqkv_cli.calibration.writing import begun, write_batch
from pqkv_cli.errors import DataError

END = 1
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


def chat_tokenizer(template: str = CHAT) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROWS", 7)
    monkeypatch.setattr(writing, "STEPS", 160)


def test_openings_are_many_and_take_turns() -> None:
    assert sum(map(len, KINDS)) >= 60
    first = list(islice(dealt(0, 0), 70))
    assert set(Counter(opening.kind for opening in first).values()) == {10, 20}  # talk stands twice among seven kinds
    assert first == list(islice(dealt(0, 0), 70))
    assert first != list(islice(dealt(0, 1), 70)) and first != list(islice(dealt(1, 0), 70))
    assert not any(mark in part for opening in first for part in opening.parts for mark in ("<name>", "<number>", "<thing>"))


def test_a_batch_is_the_same_again_and_depends_on_seed_and_number(small: None) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    texts, left_out = write_batch(model, tokenizer, 0, 0, quiet)
    assert texts and left_out == 0
    assert (texts, left_out) == write_batch(model, tokenizer, 0, 0, quiet)
    assert texts != write_batch(model, tokenizer, 0, 1, quiet)[0]
    assert texts != write_batch(model, tokenizer, 1, 0, quiet)[0]


def test_a_text_reads_nothing_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits behind a text that begins in slot 30 are those of the text alone."""
    model = tiny_llama()
    ids = torch.randint(2, 258, (2, 60), generator=torch.Generator().manual_seed(0))
    starts, cache = torch.tensor([0, 30]), writing.uncompressed_cache(model.config)
    with torch.no_grad():
        for step in range(60):
            now = torch.tensor([0, 30 if step >= 30 else 0])
            found = writing._logits(model, cache, ids[:, step : step + 1], now, step)
        for row, start in enumerate(starts.tolist()):
            alone = model(ids[row : row + 1, start:]).logits[0, -1]
            torch.testing.assert_close(found[row], alone, atol=1e-4, rtol=1e-4)


def test_sampling_follows_the_distribution() -> None:
    shares = torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = writing._sampled(shares.log().clamp(min=-1e30).expand(20000, 4), torch.Generator().manual_seed(0))
    found = drawn.bincount(minlength=4) / 20000
    torch.testing.assert_close(found, shares, atol=0.02, rtol=0.0)
    with pytest.raises(DataError, match="logits that are not finite; expected numbers: try --dtype float32"):
        writing._sampled(torch.full((1, 4), float("nan")), torch.Generator())


def written(tokenizer: Any, opening: Opening, tokens: list[int]) -> Any:
    draft = begun(tokenizer, opening, frozenset({END}), random.Random(0))
    left = list(tokens)
    while not draft.is_done:
        was_given = bool(draft.given)
        draft.next_id(0 if was_given else left.pop(0))
    return draft


def test_an_end_token_ends_a_text_and_a_talk_goes_on_with_the_next_question() -> None:
    tokenizer = chat_tokenizer()
    say = tokenizer("yes", add_special_tokens=False)["input_ids"]
    plain = written(tokenizer, Opening("prose", ("Once",)), [*say, END])
    assert plain.text() == "Onceyes</s>"
    talk = written(tokenizer, Opening("talk", ("Be kind.", "Why?", "And how?")), [*say, END, *say, END])
    assert talk.text() == "<system>Be kind.</s><user>Why?</s><assistant>yes</s><user>And how?</s><assistant>yes</s>"


def test_templates_without_a_system_and_models_without_a_template_talk_too() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    opening = Opening("talk", ("Be kind.", "Why?"))
    assert written(chat_tokenizer(no_system), opening, [END]).text() == "<user>Be kind.\n\nWhy?</s><assistant></s>"
    assert written(byte_tokenizer(), opening, [END]).text() == "Be kind.\n\nUser: Why?\n\nAssistant:</s>"


def test_texts_that_repeat_themselves_are_left_out() -> None:
    tokenizer = byte_tokenizer()
    loop = written(tokenizer, Opening("prose", ("Once",)), [5, 6, 7] * 400)
    assert loop.loops
    varied = torch.randint(2, 258, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert not written(tokenizer, Opening("prose", ("Once",)), varied).loops


def test_a_model_without_room_is_refused(small: None) -> None:
    with pytest.raises(DataError, match=r"reads at most 8 tokens, too few to write a text of its own; expected 16: give text"):
        write_batch(tiny_llama(max_position_embeddings=8), byte_tokenizer(), 0, 0, quiet)


def test_own_text_is_no_text_to_evaluate_on() -> None:
    with pytest.raises(DataError, match=r"'self' is text that a model writes for its own calibration, and for nothing else"):
        load_text("self")


def test_several_texts_get_equal_shares_in_a_seeded_order() -> None:
    tokenizer = byte_tokenizer()
    texts = ["a" * 3000, "b" * 3000, "c" * 1000]
    windows = mixed_windows(tokenizer, texts, 12, 64, seed=3)
    firsts = "".join(tokenizer.decode([row[-1]]) for row in windows.tolist())
    assert all(set(firsts[i : i + 3]) == set("abc") for i in range(0, 12, 3))
    assert firsts != "abc" * 4
    everything = mixed_windows(tokenizer, texts, None, 64, seed=3)
    assert torch.equal(everything[:12], windows)
    assert len(everything) == sum(len(token_windows(tokenizer, text, None, 64, 3)) for text in texts)
    assert torch.equal(mixed_windows(tokenizer, texts[:1], 5, 64, 3), token_windows(tokenizer, texts[0], 5, 64, 3))
    with pytest.raises(DataError, match="the text has 1000 tokens"):
        mixed_windows(tokenizer, texts, 90, 64, seed=3)
