"""Calibration windows: an equal share from each of several texts, some with questions. No files, no models."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from pqkv_cli.calibration.text import token_windows
from pqkv_cli.models.prefix import plain_ids, prefix_ids


def mixed_windows(tokenizer: Any, texts: Sequence[str], num_windows: int | None, window_tokens: int, seed: int) -> torch.Tensor:
    """Return [num_windows, window_tokens] int64 windows of `texts`, one of each in turn, in an order that `seed` decides.

    None takes all windows there are; those of a smaller number come first among them. Of one text they are `token_windows`.

    Raises
    ------
    DataError
        If a text is too short for its share.
    """
    if len(texts) == 1:
        return token_windows(tokenizer, texts[0], num_windows, window_tokens, seed)
    if num_windows is None:
        shares = [token_windows(tokenizer, text, None, window_tokens, seed) for text in texts]
        order = _order([len(share) for share in shares], seed)
    else:
        order = list(islice(_rounds(len(texts), seed), num_windows))
        # A text without a turn has no windows, which are too few to ask for.
        counts = [order.count(index) for index in range(len(texts))]
        wanted = zip(texts, counts, strict=True)
        shares = [token_windows(tokenizer, text, max(1, count), window_tokens, seed) for text, count in wanted]
    used = [0] * len(texts)
    chosen = []
    for index in order:
        chosen.append(shares[index][used[index]])
        used[index] += 1
    return torch.stack(chosen)


def _order(lengths: Sequence[int], seed: int) -> list[int]:
    """Return which text each window is of, until all `lengths` are used up; a text that has no more is passed over."""
    left, order = list(lengths), []
    for index in _rounds(len(lengths), seed):
        if not any(left):
            break
        if left[index]:
            left[index] -= 1
            order.append(index)
    return order


def _rounds(num_texts: int, seed: int) -> Iterator[int]:
    """Yield the numbers of the texts, each once a round and every round in another order.

    In a fixed order all recall windows, which are evenly spread, would fall on one text.
    """
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(num_texts), num_texts)


TOKENS_PER_FACT = 80
LEAST_TOKENS = 160  # a window must hold a fact, its question and mostly text
_WORD = re.compile(r"[^\W\d_]{3,12}")
_SPARE_WORDS = ("north", "paper", "river", "stone")

# (what is said, what is asked, what is answered). The wording of evaluation tasks is deliberately absent.
_FORMS = (
    ("\nThe code of {name} is {value}.\n", "\nWhat is the code of {name}? It is", " {value}.\n"),
    ("\n{name} = {value}\n", "\n>>> {name}\n", "{value}\n"),
    ('\n{{"name": "{name}", "number": {value}}}\n', '\nThe number of "{name}" is', " {value}\n"),
    ("\n| {name} | {value} |\n", "\nRow {name}:", " {value}\n"),
    ("\nRemember: {name} has number {value}.\n", "\nWhich number has {name}?", " {value}\n"),
    ("\n{value} belongs to {name}; {name} has {value}.\n", "\nWhat belongs to {name}?", " {value}\n"),
)
_ALPHABETS = ("0123456789", "0123456789", "0123456789abcdef")


@dataclass(frozen=True, slots=True)
class _Fact:
    said: list[int]
    asked: list[int]


def with_recall(tokenizer: Any, windows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Return `windows` [N, T] int64 with an evenly spread `share` of them turned into recall windows.

    A recall window keeps the tokens it begins with and as much of its text as fits, with named numbers woven in, half
    of which are asked for and answered at its end. Windows under `LEAST_TOKENS` tokens stay as they are.

    Parameters
    ----------
    tokenizer
        Of the model.
    windows
        As `token_windows` returns them.
    share
        Between 0 and 1.
    seed
        Of names, numbers, forms and places; a window's own number decides with it, so no window depends on another.
    """
    length = windows.shape[1]
    if length < LEAST_TOKENS:
        return windows
    turned, start = windows.clone(), prefix_ids(tokenizer)
    for index in range(len(windows)):
        if int((index + 1) * share + 1e-9) > int(index * share + 1e-9):
            rng = random.Random(seed * 1_000_003 + index)
            turned[index] = _recall_window(tokenizer, start, windows[index, len(start) :].tolist(), rng)
    return turned


def _recall_window(tokenizer: Any, start: list[int], body: list[int], rng: random.Random) -> torch.Tensor:
    """Return a window of `start` and the length of `body`, made of it."""
    words = sorted(set(_WORD.findall(tokenizer.decode(body)))) or list(_SPARE_WORDS)
    room, facts, asked = len(body), [], []
    for number in range(max(1, (len(start) + len(body)) // TOKENS_PER_FACT)):
        fact = _fact(tokenizer, words, rng)
        cost = len(fact.said) + (len(fact.asked) if number % 2 == 0 else 0)
        if cost > room // 2:  # a tokenizer that spells everything out fills the window sooner
            break
        room -= cost
        facts.append(fact)
        asked += [fact] if number % 2 == 0 else []
    rng.shuffle(asked)
    cuts = sorted(rng.randint(0, room) for _ in facts)
    woven, previous = list(start), 0
    for cut, fact in zip(cuts, facts, strict=True):
        woven += body[previous:cut] + fact.said
        previous = cut
    woven += body[previous:room]
    for fact in asked:
        woven += fact.asked
    return torch.tensor(woven, dtype=torch.int64)


def _fact(tokenizer: Any, words: list[str], rng: random.Random) -> _Fact:
    name = f"{rng.choice(words)}_{rng.choice(words)}"
    value = "".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randint(2, 8)))
    said, question, answer = (form.format(name=name, value=value) for form in rng.choice(_FORMS))
    return _Fact(plain_ids(tokenizer, said), plain_ids(tokenizer, question) + plain_ids(tokenizer, answer))
