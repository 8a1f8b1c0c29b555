"""Looks on while a model generates: when each token was there, what it took, whether logits were finite. Knows no prompts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from pqkv_cli.evaluation.energy import Energy, EnergyMeter, energy_meter
from pqkv_cli.evaluation.memory import peak_memory


class GenerationWatch(LogitsProcessor):
    """Sees the logits of every step and changes none.

    Attributes
    ----------
    broken
        Rows [B] bool whose logits were not finite.
    ticks
        Seconds: when it began, then when the logits of each token were there.
    """

    def __init__(self, num_rows: int, device: torch.device, meter: EnergyMeter | str) -> None:
        self.broken = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._device, self._meter, self._num_rows = device, meter, num_rows
        self._joules = [] if isinstance(meter, str) else [meter.joules()]
        self.ticks = [time.perf_counter()]
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    @property
    def processors(self) -> LogitsProcessorList:
        """What ``generate`` takes as its ``logits_processor``."""
        return LogitsProcessorList([self])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the `scores` [B, V] of the next token, or [B * beams, V], and return them."""
        # Minus infinity is how other processors forbid a token.
        self.broken |= (scores.isnan() | scores.isposinf()).reshape(len(self.broken), -1).any(-1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ticks.append(time.perf_counter())
        if not isinstance(self._meter, str):
            self._joules = [*self._joules[:2], self._meter.joules()]
        return scores

    @property
    def energy(self) -> Energy:
        """What answering took, by the device's own count."""
        if isinstance(self._meter, str):
            return Energy(reason=self._meter)
        if len(self._joules) < 2:
            return Energy(reason="nothing was answered")
        start, first, last = self._joules[0], self._joules[1], self._joules[-1]
        return Energy(first - start, last - first, self._num_rows * (len(self.ticks) - 2))

    def cost(self) -> dict[str, Any]:
        """Return what one batch cost: ms until its first token and for each further one, peak bytes, seconds, joules."""
        steps = [1000 * (after - before) for before, after in zip(self.ticks, self.ticks[1:], strict=False)]
        return {
            "prefill_ms": steps[0] if steps else None,
            "step_ms": [round(ms, 3) for ms in steps[1:]],
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "energy": asdict(self.energy),
        }


@contextmanager
def watching(num_rows: int, device: torch.device) -> Iterator[GenerationWatch]:
    """Yield a watch for one call of ``generate`` over `num_rows` rows; its seconds and peak are known at the end."""
    with energy_meter(device) as meter, peak_memory(device) as peak:
        watch = GenerationWatch(num_rows, device, meter)
        yield watch
    watch.peak_bytes = peak.num_bytes
    watch.seconds = time.perf_counter() - watch.ticks[0]
