"""Windows from several texts at once, an equal share from each. Knows windows and seeds; not where texts come from."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from pqkv_cli.calibration.text import token_windows


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
