"""Greedy answers of a model to a batch of prompts, with or without a cache of ours, and what they cost. Knows no tasks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pqkv_cli.evaluation.energy import Energy, EnergyMeter, energy_meter
from pqkv_cli.evaluation.memory import peak_memory


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how long its answer may be.

    Attributes
    ----------
    name
        Unique in its task, the same in every run.
    ids
        Prompt [T] int64.
    facts
        Plain data about the question, kept with its answers.
    stop_ids
        Tokens that end the answer beside the model's own; like these they cannot come before `min_new_tokens`.
    """

    name: str
    ids: torch.Tensor
    max_new_tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0

    @property
    def decoding(self) -> tuple[object, ...]:
        """What questions of one batch have in common."""
        return self.max_new_tokens, self.stop_ids, self.min_new_tokens


@dataclass(frozen=True, slots=True)
class Replies:
    """Answers of one side to one batch.

    Attributes
    ----------
    texts
        Answers; None where logits were not finite.
    prefill_ms
        Until the first token.
    step_ms
        Of every further token, for the whole batch.
    """

    texts: list[str | None]
    prefill_ms: float | None
    step_ms: list[float]
    peak_bytes: int | None
    seconds: float
    energy: Energy

    def cost(self) -> dict[str, Any]:
        """Return all but the texts, as plain data."""
        return {
            "prefill_ms": self.prefill_ms,
            "step_ms": [round(ms, 3) for ms in self.step_ms],
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "energy": asdict(self.energy),
        }


class _Watch(LogitsProcessor):
    """Sees logits that are not finite; changes none."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.broken = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is how other processors forbid a token.
        self.broken |= (scores.isnan() | scores.isposinf()).any(-1)
        return scores


class _Clock(StoppingCriteria):
    """Notes when each token was there, and the energy of the first and the last; stops nothing."""

    def __init__(self, device: torch.device, meter: EnergyMeter | str) -> None:
        self.device, self._meter = device, meter
        self.joules = [] if isinstance(meter, str) else [meter.joules()]
        self.ticks = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ticks.append(time.perf_counter())
        if not isinstance(self._meter, str):
            self.joules = [*self.joules[:2], self._meter.joules()]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def energy(self, num_rows: int) -> Energy:
        """Return what answering `num_rows` prompts took."""
        if isinstance(self._meter, str):
            return Energy(reason=self._meter)
        if len(self.joules) < 2:
            return Energy(reason="nothing was answered")
        start, first, last = self.joules[0], self.joules[1], self.joules[-1]
        return Energy(first - start, last - first, num_rows * (len(self.ticks) - 2))


@torch.no_grad()
def reply(model: Any, tokenizer: Any, questions: Sequence[Question], cache: Any) -> Replies:
    """Answer questions of equal `decoding` in one left-padded batch; without a `cache` as the model does by itself."""
    first = questions[0]
    assert all(question.decoding == first.decoding for question in questions)
    stops = _stop_ids(model, first)
    ids, mask = _padded([question.ids for question in questions], _pad_id(tokenizer, stops), model.device)
    watch = _Watch(len(questions), model.device)
    with energy_meter(model.device) as meter, peak_memory(model.device) as peak:
        clock = _Clock(model.device, meter)
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=first.max_new_tokens,
            min_new_tokens=first.min_new_tokens or None,
            do_sample=False,
            num_beams=1,
            eos_token_id=stops or None,
            pad_token_id=_pad_id(tokenizer, stops),
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    texts = [tokenizer.decode(_until(row, stops), skip_special_tokens=True) for row in output[:, ids.shape[1] :].tolist()]
    steps = [1000 * (after - before) for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return Replies(
        texts=[None if broken else text for text, broken in zip(texts, watch.broken.tolist(), strict=True)],
        prefill_ms=steps[0] if steps else None,
        step_ms=steps[1:],
        peak_bytes=peak.num_bytes,
        seconds=time.perf_counter() - clock.ticks[0],
        energy=clock.energy(len(questions)),
    )


def _stop_ids(model: Any, question: Question) -> list[int]:
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*own, *question.stop_ids]))


def _pad_id(tokenizer: Any, stops: Sequence[int]) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops)
    return next((int(token) for token in known if token is not None), 0)


def _padded(rows: Sequence[torch.Tensor], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
