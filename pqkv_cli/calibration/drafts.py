"""One text while a model writes it: what it is given to read, when it is to stop. Knows tokenizers; no models, no logits."""

import random
from dataclasses import dataclass, field
from typing import Any

from pqkv_cli.calibration.openings import Opening
from pqkv_cli.errors import DataError
from pqkv_cli.models.chat import talk_text
from pqkv_cli.models.prefix import plain_ids, prefix_ids, whole_ids

_SHORTEST, _LONGEST = 128, 320  # tokens behind the opening after which a text is cut, drawn between them
_RUN_TOKENS, _LEAST_RUNS, _LEAST_DISTINCT = 8, 40, 0.5
_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character


@dataclass(slots=True)
class Draft:
    """A text on its way: its tokens, those it must still be given, and how many the model may add before it is cut."""

    tokenizer: Any
    opening: Opening
    ends: frozenset[int]
    room: int
    ids: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    is_done: bool = False

    def next_id(self, sampled: int) -> int:
        """Return the token that follows: one that is given, else `sampled`, with which the text may be at its end."""
        if not self.given:
            self._take(sampled)
        token = self.given.pop(0) if self.given else sampled
        self.ids.append(token)
        if len(self.ids) >= self.room and not self.given:
            self.is_done = True
        return token

    def _take(self, sampled: int) -> None:
        """Add what the model says; where that ends its answer, the user's next turn is given."""
        if sampled not in self.ends:
            self.answer.append(sampled)
        turns_left = self.opening.parts[1 + len(self.said) // 2 + 1 :] if self.opening.is_talk else ()
        is_long = len(self.answer) >= self.room // (len(self.opening.parts) - 1) if turns_left else False
        if sampled not in self.ends and not is_long:
            return
        if not turns_left:
            self.is_done = True
            return
        try:
            self._ask(turns_left[0])
        except DataError:  # a template that takes one turn only
            self.is_done = True

    def _ask(self, turn: str) -> None:
        """Give the model what a template puts behind its answer, with the user's next `turn` in it."""
        # The first turn, if this is the first answer.
        self.said = self.said or [self.opening.parts[1]]
        before = talk_text(self.tokenizer, self.opening.parts[0], self.said)
        reply = self.tokenizer.decode(self.answer, skip_special_tokens=True).strip()
        self.said = [*self.said, reply, turn]
        whole = talk_text(self.tokenizer, self.opening.parts[0], self.said)
        self.given = plain_ids(self.tokenizer, _behind(before, reply, whole))
        self.answer = []
        if not self.given:
            raise DataError("the template puts nothing behind an answer; expected the next turn: mend chat_template")

    def text(self) -> str:
        """Return the whole text, special tokens written out, without the tokens that every text begins with."""
        body = self.ids[len(prefix_ids(self.tokenizer)) :]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        found: str = self.tokenizer.decode(body, **options)
        return found.strip(_UNFINISHED)

    @property
    def loops(self) -> bool:
        """Whether the text says the same over and over."""
        runs = [tuple(self.ids[i : i + _RUN_TOKENS]) for i in range(len(self.ids) - _RUN_TOKENS + 1)]
        return len(runs) >= _LEAST_RUNS and len(set(runs)) < _LEAST_DISTINCT * len(runs)


def begun(tokenizer: Any, opening: Opening, ends: frozenset[int], rng: random.Random) -> Draft:
    """Return the draft of a text that begins with `opening`; its length is drawn from `rng`."""
    text = talk_text(tokenizer, opening.parts[0], opening.parts[1:2]) if opening.is_talk else opening.parts[0]
    given = whole_ids(tokenizer, text)
    return Draft(tokenizer, opening, ends, len(given) + rng.randint(_SHORTEST, _LONGEST), given=given)


def _behind(before: str, reply: str, whole: str) -> str:
    """Return what stands in `whole` behind `reply`, which stands behind `before`.

    Raises
    ------
    DataError
        If the template writes answers of earlier turns otherwise than it asks for them.
    """
    place = whole.find(reply, len(before) - 8 if len(before) > 8 else 0) if reply else len(before)
    if place < 0 or not whole.startswith(before[: len(before) // 2]):
        raise DataError("the template rewrites earlier turns; expected them as they were: mend chat_template")
    return whole[place + len(reply) :]
