"""Prompts in batches, answered over both caches, and what that cost. Knows no task."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.errors import is_out_of_memory
from pqkv_cli.evaluation.generation import Question, Replies, reply
from pqkv_cli.evaluation.record import BitsPerChannel, cache_bits, fullest_bits
from pqkv_cli.evaluation.sample_log import Group, Sample
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.text_windows import CacheFactory, contender
from pqkv_cli.models.load import free_memory
from pqkv_cli.reporter import Advance

Batch = Mapping[str, Any]


def answering_cost(sides: Mapping[str, Sequence[Batch]]) -> dict[str, Any]:
    """Return a record's ``cost`` from the batches of each side, as `Replies.cost` gives them.

    Milliseconds until the first token and per further token of a batch (quantiles), peak bytes, seconds of all batches, joules.
    """
    peaks = {side: [b["peak_bytes"] for b in own if b["peak_bytes"] is not None] for side, own in sides.items()}
    return {
        "prefill_ms": {side: _quantiles([b["prefill_ms"] for b in own if b["prefill_ms"]]) for side, own in sides.items()},
        "ms_per_token": {side: _quantiles([ms for b in own for ms in b["step_ms"]]) for side, own in sides.items()},
        "peak_bytes": {side: max(own) if own else None for side, own in peaks.items()},
        "seconds": {side: sum(b["seconds"] for b in own) for side, own in sides.items()},
        "energy": {side: _energy([b.get("energy", {}) for b in own]) for side, own in sides.items()},
    }


def _energy(batches: Sequence[Batch]) -> dict[str, Any]:
    """Return joules until the first token of a batch and per further token, or None with the reason of the first without."""
    missing = [str(batch.get("reason")) for batch in batches if batch.get("decode") is None]
    num_tokens = sum(batch.get("num_tokens", 0) for batch in batches)
    if missing or not num_tokens:
        reason = missing[0] if missing else "no further tokens were answered"
        return {"prefill_joules": None, "joules_per_token": None, "reason": reason}
    prefill, decode = (sum(batch[part] for batch in batches) for part in ("prefill", "decode"))
    return {"prefill_joules": prefill / len(batches), "joules_per_token": decode / num_tokens, "reason": None}


def _quantiles(values: list[float]) -> dict[str, float | None]:
    points = {"p20": 20, "p50": 50, "p90": 90}
    return {name: float(np.percentile(values, point)) if values else None for name, point in points.items()}


Score = Callable[[Question, str], float]
SIDES = ("baseline", "quantized")
# Prompts of unequal length are padded, and attention then no longer skips what lies ahead of a query: more work for the prompt,
# with the square of its length, for fewer steps of answering. It pays up to so many squared tokens per token of answer; on a
# CPU up to fewer, because prompts are slow there and a step of several rows costs nearly as much as their own steps.
_PADDED_SQUARE, _PADDED_SQUARE_CPU = 2**18, 2**16
_MASK_ENTRIES = 2**27  # of the mask that padding needs: rows times the square of the length


@dataclass(frozen=True, slots=True)
class Answers:
    """What both models answered.

    Attributes
    ----------
    samples
        Per question its ``name``, ``facts``, and of each side ``text`` and ``score``; None where logits were not finite.
    cost
        Record's ``cost``: of each side milliseconds until the first token and per further token, peak bytes, seconds.
    """

    samples: list[Sample]
    bits: BitsPerChannel
    cost: Mapping[str, Any]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the questions that have no score, with the reason."""
        return tuple(f"{s['name']}: {s['failed']}" for s in self.samples if "failed" in s)

    @property
    def scored(self) -> list[Sample]:
        """The samples that both models answered."""
        return [sample for sample in self.samples if "failed" not in sample]


def ask(
    subject: Subject,
    settings: EvaluationSettings,
    questions: Sequence[Question],
    score: Score,
    on_progress: Advance,
) -> Answers:
    """Ask every question with and without compression; batches that the subject's log holds already are not asked again.

    A batch for which memory does not suffice is halved, with a warning, and so are those after it that are as large.
    """
    pays = _PADDED_SQUARE_CPU if subject.model.device.type == "cpu" else _PADDED_SQUARE
    groups, done, waiting = [], 0, _batches(questions, settings.batch_tokens, pays)[::-1]
    too_large = math.inf  # padded tokens
    with contender(subject, settings.mode) as new_cache:
        while waiting:
            batch = waiting.pop()
            group = subject.log.get(_name(batch))
            if group is None and (_padded_tokens(batch) < too_large or len(batch) == 1):
                group = _asked(subject, batch, new_cache, score)
            if group is None:
                half, too_large = len(batch) // 2, min(too_large, _padded_tokens(batch))
                waiting += [batch[half:], batch[:half]]
                continue
            groups.append(group)
            done += len(batch)
            on_progress(done, len(questions))
    answered = {sample["name"]: sample for group in groups for sample in group.samples}
    samples = [answered[question.name] for question in questions]
    bits = fullest_bits([group.facts["bits"] for group in groups], subject.artifact)
    costs = {side: [group.facts["cost"][side] for group in groups] for side in SIDES}
    batch_size = max((group.facts["batch"] for group in groups), default=0)
    return Answers(samples, bits, {**answering_cost(costs), "batch_size": batch_size})


def _batches(questions: Sequence[Question], budget: int, pays: int) -> list[list[Question]]:
    """Cut `questions` into batches of at most `budget` padded tokens, whose content depends on nothing else.

    Rows of unequal length share one up to `pays` squared tokens per token of answer. The longest come first: what memory cannot
    hold is known early.
    """
    alike: dict[tuple[object, ...], list[Question]] = {}
    for question in sorted(questions, key=lambda question: -len(question.ids)):
        alike.setdefault(question.decoding, []).append(question)
    batches = [batch for group in alike.values() for batch in _cut(group, budget, pays)]
    return sorted(batches, key=lambda batch: -len(batch[0].ids))


def _cut(questions: Sequence[Question], budget: int, pays: int) -> Iterator[list[Question]]:
    """Cut `questions` of one decoding, the longest first, where the next is better answered in another batch."""
    batch: list[Question] = []
    for question in questions:
        if batch and not _belongs(question, batch, budget, pays):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def _name(batch: Sequence[Question]) -> str:
    return f"{batch[0].name}+{len(batch)}"


def _padded_tokens(batch: Sequence[Question]) -> int:
    return len(batch) * (max(len(question.ids) for question in batch) + batch[0].max_new_tokens)


def _belongs(question: Question, batch: Sequence[Question], budget: int, pays: int) -> bool:
    """Return whether `question` is better answered together with `batch`, of its decoding and no shorter, than alone."""
    lengths = [len(other.ids) for other in (*batch, question)]
    rows, longest = len(lengths), max(lengths)
    if rows * (longest + question.max_new_tokens) > budget:
        return False
    square = longest**2
    return min(lengths) == longest or (square <= pays * question.max_new_tokens and rows * square <= _MASK_ENTRIES)


def _asked(subject: Subject, batch: list[Question], new_cache: CacheFactory, score: Score) -> Group | None:
    """Return the answers to `batch`, None where memory does not suffice for all its questions at once."""
    try:
        return subject.log.add(_name(batch), *_ask_batch(subject, batch, new_cache, score))
    except Exception as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    # Behind the clause: until its end the error holds on to all that was allocated.
    free_memory()
    rows = len(batch)
    warnings.warn(f"out of memory with {rows} prompts at once; going on with {rows - rows // 2}", stacklevel=2)
    return None


def _ask_batch(
    subject: Subject, batch: list[Question], new_cache: CacheFactory, score: Score
) -> tuple[list[Sample], dict[str, Any]]:
    model, tokenizer = subject.model, subject.tokenizer
    key, cache = _fingerprint(batch), new_cache()
    if key not in subject.baseline:
        subject.baseline[key] = reply(model, tokenizer, batch, None)
    replies: dict[str, Replies] = {"baseline": subject.baseline[key], "quantized": reply(model, tokenizer, batch, cache)}
    held = asdict(cache_bits(cache)) if isinstance(cache, QuantizedCache) else None
    samples = [_sample(question, {side: replies[side].texts[i] for side in SIDES}, score) for i, question in enumerate(batch)]
    return samples, {"bits": held, "batch": len(batch), "cost": {side: replies[side].cost for side in SIDES}}


def _fingerprint(batch: Sequence[Question]) -> str:
    """Return a hash of all that the answers of one model to `batch` depend on."""
    total = hashlib.sha256(repr(batch[0].decoding).encode())
    for question in batch:
        total.update(f"{len(question.ids)} ".encode())
        total.update(question.ids.numpy().tobytes())
    return total.hexdigest()


def _sample(question: Question, texts: Mapping[str, str | None], score: Score) -> Sample:
    sample: Sample = {"name": question.name, "num_tokens": len(question.ids), "facts": dict(question.facts)}
    for side in SIDES:
        text = texts[side]
        sample[side] = None if text is None else {"text": text, "score": score(question, text)}
    if broken := [side for side in SIDES if sample[side] is None]:
        sample["failed"] = f"logits of the {' and the '.join(broken)} model are not finite"
    return sample
