"""Recall tasks as rows of token ids: what the reference model is trained on beside text.

Knows tokens, not models. Every row starts with BOS and has a weight per target token, so that the loss can favour the
answers. The templates of the pass key task are the evaluation's own (`pqkv_cli.evaluation.passkey`).
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pqkv_cli.evaluation.passkey import PASSKEY_DIGITS, passkey_texts

_ADJECTIVES = (
    "amber brave calm dusty early faint gentle hollow icy jolly keen lucid mellow noble odd pale quiet rapid silent tidy "
    "urban vivid warm young zesty bitter clever double eager formal green humble"
).split()
_NOUNS = (
    "anchor basket candle desert engine forest garden hammer island jacket kettle ladder meadow needle orchard pepper quarry "
    "ribbon saddle temple umbrella valley window yard zebra bridge copper dragon ember falcon glacier harbor"
).split()


@dataclass(frozen=True, slots=True)
class Row:
    """One training row of ``T + 1`` tokens: `tokens` [T+1] int64, `weights` [T] of the targets, `positions` [T] int64."""

    tokens: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


class RowMaker:
    """Makes rows of every kind from one stream of filler tokens.

    Parameters
    ----------
    tokenizer
        The reference tokenizer.
    filler
        Token ids of the text to train on and to hide needles in, [N].
    answer_weight
        Loss weight of an answer token; text tokens weigh 1.
    max_position
        Positions are stretched by random gaps up to this number.
    """

    def __init__(self, tokenizer: Tokenizer, filler: np.ndarray, answer_weight: float, max_position: int) -> None:
        self.tokenizer = tokenizer
        self.filler = filler
        self.answer_weight = answer_weight
        self.max_position = max_position
        self.bos_id = tokenizer.token_to_id("<s>")
        self.kinds = {"text": self.text, "copy": self.copy, "passkey": self.passkey, "lookup": self.lookup}

    def text(self, length: int, rng: np.random.Generator) -> Row:
        """Return a window of text."""
        tokens = np.concatenate([[self.bos_id], self._slice(length, rng)])
        return Row(tokens, np.ones(length), np.arange(length))

    def copy(self, length: int, rng: np.random.Generator) -> Row:
        """Return random tokens that repeat with a random period; only the repetitions are learned."""
        period = int(rng.integers(4, max(5, length // 2)))
        segment = rng.integers(4, self.tokenizer.get_vocab_size(), period)
        tokens = np.concatenate([[self.bos_id], np.resize(segment, length)])
        weights = (np.arange(length) >= period).astype(float)
        return Row(tokens, weights, self._stretched(length, rng, np.array([period + 1])))

    def passkey(self, length: int, rng: np.random.Generator) -> Row:
        """Return one hidden pass key and the question for it."""
        key = "".join(str(d) for d in rng.integers(0, 10, PASSKEY_DIGITS))
        needle, question, answer = passkey_texts(key)
        return self._recall([needle], [(question, answer)], length, rng)

    def lookup(self, length: int, rng: np.random.Generator, num_keys: int | None = None, num_asked: int | None = None) -> Row:
        """Return named numbers hidden in text and questions for some of them; by default as many as suit `length`."""
        if num_keys is None:
            num_keys = int(rng.integers(2, max(3, min(33, length // 48))))
        names = rng.choice(len(_ADJECTIVES) * len(_NOUNS), num_keys, replace=False)
        pairs = [(lookup_name(int(n)), f"{rng.integers(0, 10_000):04d}") for n in names]
        asked = rng.permutation(num_keys)[: num_asked or min(4, length // 64)]
        needles = [lookup_line(*pair) for pair in pairs]
        return self._recall(needles, [lookup_question(*pairs[i]) for i in asked], length, rng)

    def _recall(self, needles: list[str], asked: list[tuple[str, str]], length: int, rng: np.random.Generator) -> Row:
        needle_ids = [self._ids(needle) for needle in needles]
        tail, weights = [], []
        for question, answer in asked:
            question_ids, answer_ids = self._ids(question), self._ids(answer)
            tail += [*question_ids, *answer_ids]
            weights += [1.0] * len(question_ids) + [self.answer_weight] * len(answer_ids)
        room = length - len(tail) - sum(map(len, needle_ids))
        if room < 0:
            raise ValueError(f"a row of {length} tokens cannot hold {len(needles)} needles and {len(asked)} questions")
        filler = self._slice(room, rng)
        cuts = np.sort(rng.integers(0, room + 1, len(needles)))
        pieces = [np.array([self.bos_id])]
        for cut, previous, ids in zip(cuts, [0, *cuts[:-1]], needle_ids, strict=True):
            pieces += [filler[previous:cut], np.array(ids)]
        tokens = np.concatenate([*pieces, filler[cuts[-1] :], np.array(tail)])
        all_weights = np.concatenate([np.ones(length - len(tail)), weights])
        return Row(tokens, all_weights, self._stretched(length, rng, rng.integers(1, length - len(tail) + 1, 2)))

    def _stretched(self, length: int, rng: np.random.Generator, where: np.ndarray) -> np.ndarray:
        """Return positions with gaps before the indices `where`, so that short rows teach long distances."""
        positions = np.arange(length)
        room = self.max_position - length
        if room > 0 and rng.random() < 0.7:
            for index in where:
                gap = int(rng.integers(0, room + 1) * rng.random())
                positions[index:] += gap
                room -= gap
        return positions

    def _slice(self, length: int, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.integers(0, len(self.filler) - length))
        return self.filler[start : start + length]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def lookup_name(index: int) -> str:
    """Return the `index`-th of the 1,024 names of the look-up task."""
    return f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}"


def lookup_line(name: str, value: str) -> str:
    """Return the line that hides `value` under `name`."""
    return f"\nThe value of {name} is {value}.\n"


def lookup_question(name: str, value: str) -> tuple[str, str]:
    """Return the question for `name` and the answer expected."""
    return f"\nQuestion: the value of {name} is", f" {value}."
