"""Texts that a model writes for its own calibration, in batches: what each begins with, when it ends."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from pqkv_cli.calibration.openings import Opening, dealt
from pqkv_cli.errors import DataError
from pqkv_cli.hf.cache_layers import uncompressed_cache
from pqkv_cli.hf.configs import position_limit
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.chat import talk_text
from pqkv_cli.models.prefix import plain_ids, prefix_ids, whole_ids
from pqkv_cli.reporter import Advance

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


ROWS, STEPS = 32, 384  # of a batch: wide enough for a CPU to be busy, short enough to go on with after a kill
_LEAST_ROOM = 16  # positions without which no text is worth writing


@dataclass(frozen=True, slots=True)
class Written:
    """One text that a model wrote, and what it is like."""

    text: str
    kind: str


@torch.no_grad()
def write_batch(model: Any, tokenizer: Any, seed: int, batch: int, on_progress: Advance) -> tuple[list[Written], int]:
    """Return the texts of one batch, and how many were left out because they repeat themselves.

    They depend on the model, `seed` and the number `batch`, not on batches before it. ``on_progress(done, total)`` counts
    tokens.

    Raises
    ------
    DataError
        If logits are not finite, or the model has no room for a text.
    """
    steps = _num_steps(model)
    desk = _Desk(tokenizer, _end_ids(model, tokenizer), seed, batch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + batch)
    cache, was_training = uncompressed_cache(model.config), model.training
    model.eval()
    try:
        sampled = torch.zeros(ROWS, dtype=torch.int64)
        for step in range(steps):
            ids = desk.next_ids(sampled.tolist(), step)
            sampled = _sampled(_logits(model, cache, ids, desk.starts, step), generator)
            on_progress((step + 1) * ROWS, steps * ROWS)
    finally:
        model.train(was_training)
    return desk.finished()


class _Desk:
    """All rows of a batch: whose draft is written where, and since which slot."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], seed: int, batch: int) -> None:
        self._openings, self._rng = dealt(seed, batch), random.Random(seed * 1_000_003 + batch)
        self._tokenizer, self._ends = tokenizer, ends
        self._drafts = [self._begin() for _ in range(ROWS)]
        self._finished: list[Draft] = []
        self.starts = torch.zeros(ROWS, dtype=torch.int64)

    def _begin(self) -> Draft:
        return begun(self._tokenizer, next(self._openings), self._ends, self._rng)

    def next_ids(self, sampled: list[int], step: int) -> torch.Tensor:
        """Return the tokens [ROWS, 1] int64 of slot `step`; a row whose text was at its end begins another one with it."""
        ids = []
        for row, token in enumerate(sampled):
            if self._drafts[row].is_done:
                self._finished.append(self._drafts[row])
                self._drafts[row] = self._begin()
                self.starts[row] = step
            ids.append(self._drafts[row].next_id(token))
        return torch.tensor(ids, dtype=torch.int64)[:, None]

    def finished(self) -> tuple[list[Written], int]:
        """Return all texts, those that the end of the batch cut among them, and how many were left out."""
        drafts = [*self._finished, *(draft for draft in self._drafts if not draft.given)]
        kept = [draft for draft in drafts if not draft.loops]
        return [Written(draft.text(), draft.opening.kind) for draft in kept], len(drafts) - len(kept)


def _logits(model: Any, cache: Any, ids: torch.Tensor, starts: torch.Tensor, step: int) -> torch.Tensor:
    """Return the logits [ROWS, V] behind the tokens `ids` [ROWS, 1] in slot `step`, each row's text beginning at `starts`."""
    mask = (torch.arange(step + 1)[None] >= starts[:, None]).long()
    positions = (step - starts)[:, None]
    given = {"attention_mask": mask, "position_ids": positions}
    given = {name: tensor.to(model.device) for name, tensor in given.items()}
    logits: torch.Tensor = model(ids.to(model.device), **given, **cache_argument(model, cache), use_cache=True).logits
    return logits[:, -1].float().cpu()


def _sampled(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one token [ROWS] int64 per row of `logits` [ROWS, V], drawn at temperature 1."""
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the model writes with logits that are not finite; expected numbers: try --dtype float32")
    sums = logits.softmax(-1).cumsum(-1)
    # Scaled by the last sum, which rounding keeps from being exactly 1.
    points = torch.rand(len(logits), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, points)[:, 0].clamp(max=logits.shape[1] - 1)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    return frozenset(int(token) for token in (*own, tokenizer.eos_token_id) if token is not None)


def _num_steps(model: Any) -> int:
    limit = position_limit(model.config)
    steps = min(STEPS, limit) if isinstance(limit, int) else STEPS
    if steps < _LEAST_ROOM:
        raise DataError(
            f"the model reads at most {steps} tokens, too few to write a text of its own; expected {_LEAST_ROOM}: give text "
            "with --data FILE or --data stdlib:broad"
        )
    return steps
