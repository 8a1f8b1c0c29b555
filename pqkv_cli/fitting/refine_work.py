"""Text through a model, quantized and not, and how codebooks should follow. Knows a model and codecs; no files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.fitting.refine_codec import Mode, WatchedCodec
from pqkv_cli.fitting.refine_sums import CodecSums, Weighting, moved
from pqkv_cli.hf.names import cache_argument
from pqkv_kernels.tables import CodecTables

_LN2 = 0.6931471805599453


class Simulation(Protocol):
    """A model prepared for caches of mode ``all``."""

    def new_cache(self) -> Any:
        """Return an empty cache that quantizes every key and value."""
        ...


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """How to refine.

    Attributes
    ----------
    seed
        Of the tokens drawn from the model's own distribution.
    rounds
        Most passes over the training windows.
    weightings
        What the parts of vectors may count for; the first round chooses one.
    selection_share
        Share of the training windows that judge each round, at least one window.
    least_held_out, least_errors
        The result is kept if there are so many held-out windows and the mean improvement is so many standard errors.
    """

    seed: int = 0
    rounds: int = 2
    weightings: tuple[Weighting, ...] = ("equal", "root", "fisher")
    selection_share: float = 1 / 12
    least_held_out: int = 4
    least_errors: float = 3.0


class RefineWork:
    """A model, its codecs as they are now, and the ways through it."""

    def __init__(
        self,
        model: Any,
        simulation: Simulation,
        codecs: Sequence[WatchedCodec],
        settings: RefineSettings,
        counter: "PassCounter",
    ) -> None:
        self.model, self.simulation, self.codecs, self.settings, self.counter = model, simulation, codecs, settings, counter
        self.generator = torch.Generator().manual_seed(settings.seed)

    def improve(self, training: torch.Tensor, selection: torch.Tensor) -> tuple[tuple[float, ...], Weighting | None]:
        """Move the centroids as long as it helps.

        Returns
        -------
        tuple
            The divergence on `selection` before and after each round, and the weighting chosen, None if none helped.
        """
        course, chosen, weightings = [fmean(self.divergences(selection))], None, self.settings.weightings
        for _ in range(self.settings.rounds):
            sums = self.sums(training, weightings)
            start, found = [codec.tables for codec in self.codecs], []
            for name in weightings:
                self.set_tables([moved(tables, own.steps()) for tables, own in zip(start, sums[name], strict=True)])
                found.append((fmean(self.divergences(selection)), name, [codec.tables for codec in self.codecs]))
            best, name, tables = min(found, key=lambda each: each[0])
            if best >= course[-1]:
                self.set_tables(start)
                break
            self.set_tables(tables)
            course.append(best)
            chosen, weightings = name, (name,)
        return tuple(course), chosen

    def set_tables(self, tables: Sequence[CodecTables]) -> None:
        """Give every codec its tables."""
        for codec, own in zip(self.codecs, tables, strict=True):
            codec.tables = own

    @torch.no_grad()
    def divergences(self, windows: torch.Tensor) -> tuple[float, ...]:
        """Return the mean divergence of each window, bits per token; the codecs measure their errors on these windows alone."""
        for codec in self.codecs:
            codec.forget_errors()
        found = []
        for window in windows:
            plain = self.logits(window, "exact").log_softmax(-1)
            found.append(float((plain.exp() * (plain - self.logits(window, "coded").log_softmax(-1))).sum(-1).mean()) / _LN2)
            self.counter.step()
        return tuple(found)

    def sums(self, windows: torch.Tensor, weightings: Sequence[Weighting]) -> Mapping[Weighting, list[CodecSums]]:
        """Return, by weighting and codec, what cells hold while `windows` go through the quantized model.

        What a vector should be is what the uncompressed model has in its place, so errors of the layers before are taken out
        again as far as codes tell them.
        """
        sums = {name: [CodecSums(codec.tables, name) for codec in self.codecs] for name in weightings}
        for index, window in enumerate(windows):
            with torch.no_grad():
                self.logits(window, "exact")
            for number, (codec, score) in enumerate(zip(self.codecs, self._scores(window), strict=True)):
                assert codec.trace is not None and codec.exact is not None  # both passes went through every codec
                error = codec.exact - codec.trace.decoded
                for name in weightings:
                    sums[name][number].add(index % 2, codec.trace.codes, error, score)
                codec.trace = codec.exact = None
            self.counter.step()
        return sums

    def _scores(self, window: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the gradient [1, Hkv, T, D] of the log-likelihood of drawn tokens with respect to each codec's vectors."""
        likely = self.logits(window, "traced").log_softmax(-1)
        shifts = [codec.trace.shift for codec in self.codecs if codec.trace is not None]
        drawn = torch.multinomial(likely.detach().exp().cpu(), 1, generator=self.generator).to(likely.device)
        return torch.autograd.grad(likely.gather(-1, drawn).sum(), shifts)

    def logits(self, window: torch.Tensor, mode: Mode) -> torch.Tensor:
        """Return the logits [T, V] fp32 of the model while its codecs are in `mode`.

        Raises
        ------
        DataError
            If they are not finite.
        """
        ids = window[None].to(self.model.device)
        with _in_mode(self.codecs, mode):
            cache = self.simulation.new_cache()
            logits: torch.Tensor = self.model(ids, **cache_argument(self.model, cache), use_cache=True).logits[0].float()
        if not bool(torch.isfinite(logits.detach()).all()):
            raise DataError("the model gives logits that are not finite; expected numbers: try --dtype float32")
        return logits


class PassCounter:
    """Tells how many windows have gone through the model."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def step(self) -> None:
        """Count one window."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)

    def end(self) -> None:
        """Say that all is done, though it may have taken fewer windows."""
        self.done = self.total - 1
        self.step()


@contextmanager
def _in_mode(codecs: Sequence[WatchedCodec], mode: Mode) -> Iterator[None]:
    for codec in codecs:
        codec.mode = mode
    try:
        yield
    finally:
        for codec in codecs:
            codec.mode = "coded"
