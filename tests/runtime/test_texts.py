"""What new tokens add to a prompt's text: all at once, piece by piece, for every way to decode."""

import random
from typing import Any

import pytest
import torch
from tokenizers_like import TOKENIZERS, like_bytes, like_sentencepiece

from pqkv_cli.runtime.generate import TextPieces, added_text


def pieces_of(tokenizer: Any, prompt: list[int], new: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = TextPieces(tokenizer, pieces.append)
    stream.put(torch.tensor([prompt]))
    for token in new:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_together_are_the_text_and_the_text_is_what_decoding_has_more(name: str) -> None:
    tokenizer, chance = TOKENIZERS[name](), random.Random(0)
    for trial in range(150):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(2, 120))]
        cut = chance.randrange(1, len(tokens))
        prompt, new = tokens[:cut], tokens[cut:]
        text = added_text(tokenizer, prompt, new)
        before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, tokens))
        assert whole.endswith(text), trial
        if whole.startswith(before):
            assert before + text == whole, trial
        assert "".join(pieces_of(tokenizer, prompt, new)) == text, trial


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_come_in_pieces_too(name: str) -> None:
    tokenizer, chance = TOKENIZERS[name](), random.Random(1)
    lines = " ".join(chance.choice(("there", "was", "a", "girl", ",", "time\n")) for _ in range(500))
    tokens = tokenizer(lines, add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, tokens[:100], tokens[100:])
    assert "".join(pieces) == added_text(tokenizer, tokens[:100], tokens[100:])
    assert len(pieces) > 100, "the text came all at once"


def test_the_first_space_stays() -> None:
    tokenizer = like_sentencepiece()
    prompt, new = tokenizer("there was a").input_ids, tokenizer("girl").input_ids
    assert tokenizer.decode(new) == "girl"
    assert added_text(tokenizer, prompt, new) == " girl"
    assert pieces_of(tokenizer, prompt, new) == [" girl"]


@pytest.mark.parametrize("make", [like_sentencepiece, like_bytes])
@pytest.mark.parametrize("in_prompt", [1, 2])
def test_a_character_that_the_prompt_begins_is_completed(make: Any, in_prompt: int) -> None:
    tokenizer = make()
    tokens = tokenizer("was \u20ac was").input_ids
    first = len(tokenizer("was ").input_ids) + in_prompt
    assert added_text(tokenizer, tokens[:first], tokens[first:]) == "\u20ac was"
    pieces = pieces_of(tokenizer, tokens[:first], tokens[first:])
    assert "".join(pieces) == "\u20ac was"
    assert "\ufffd" not in "".join(pieces)


def test_special_tokens_have_no_text_and_take_no_space_away() -> None:
    tokenizer = like_sentencepiece()
    end, prompt, new = tokenizer.eos_token_id, tokenizer("there was").input_ids, tokenizer("a girl").input_ids
    for given, added in (([*prompt, end], new), (prompt, [end, *new]), (prompt, [*new, end]), ([end] * 80 + prompt, new)):
        assert added_text(tokenizer, given, added) == " a girl"
        assert "".join(pieces_of(tokenizer, given, added)) == " a girl"
    assert added_text(tokenizer, [tokenizer.bos_token_id], new) == "a girl", "no text stands before it"


def test_no_new_tokens_are_no_text() -> None:
    tokenizer = like_sentencepiece()
    prompt = tokenizer("there was").input_ids
    assert added_text(tokenizer, prompt, []) == ""
    assert pieces_of(tokenizer, prompt, []) == []
    assert pieces_of(tokenizer, prompt, [tokenizer.eos_token_id]) == []
