"""One round of refining: codecs whose inputs and codes are recorded, and the sums that move centroids. Knows no model.

Codes are chosen as always; gradients take the decoded vector for the vector itself (straight-through, Bengio et al. 2013), so
that what later layers make of an error reaches the layers before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.quantizers.codec import ProductCodec, check_known
from pqkv_cli.quantizers.product import stored
from pqkv_cli.runtime.attach import Simulation
from pqkv_kernels.dispatch import quantize, to_code_space
from pqkv_kernels.format.layout import CodeGroup
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import dequantize, from_code_space

Mode = Literal["coded", "exact", "traced"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One call of a codec.

    Attributes
    ----------
    codes
        As `quantize` returns them: [B, Hkv, M, T] int64 of every group in storage order.
    decoded
        What they stand for in code space, [B, Hkv, T, D] fp32.
    shift
        Zeros of that shape that were added to the decoded vectors; their gradient is that of the vectors.
    """

    codes: list[torch.Tensor]
    decoded: torch.Tensor
    shift: torch.Tensor


class WatchedCodec(ProductCodec):
    """Product quantization by `tables`, which may be replaced.

    In the mode ``exact`` it leaves vectors as they are and keeps them, in code space, as `exact`; in the mode ``traced`` it
    keeps its last call as `trace`.
    """

    def __init__(self, tables: CodecTables) -> None:
        super().__init__(tables)
        self.mode: Mode = "coded"
        self.exact: torch.Tensor | None = None
        self.trace: Trace | None = None
        self.forget_errors()

    def forget_errors(self) -> None:
        """Begin to measure the relative error anew."""
        self._squares = torch.zeros(2, self.tables.num_heads, dtype=torch.float64)

    @property
    def relative_error(self) -> tuple[float, ...]:
        """``||x - x'||^2 / ||x||^2`` in code space over all vectors since errors were last forgotten, per KV head."""
        error, energy = self._squares
        return tuple(torch.where(energy > 0, error / energy.clamp(min=torch.finfo(torch.float64).tiny), 0.0).tolist())

    def encode_decode(self, x: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Return the decoded codes of `x` [B, Hkv, T, D], fp32, or in the mode ``exact`` `x` itself."""
        self.tables = self.tables.to(x.device)
        layout, codebooks = self.tables.layout, self.tables.codebooks
        coded = to_code_space(x, self.tables, rotated=False)
        if self.mode == "exact":
            self.exact = coded.detach()
            return x.float()
        if known is None:
            check_known(self.tables)
            known = torch.zeros_like(coded)
        known = known.detach()
        codes = quantize(coded.detach() - known, layout, codebooks)
        decoded = known + dequantize(codes, layout, codebooks)
        squares = torch.stack(((coded.detach() - decoded).square(), coded.detach().square()))
        self._squares += squares.sum(dim=(1, 3, 4), dtype=torch.float64).cpu()
        if self.mode == "traced":
            self.trace = Trace(codes, decoded, torch.zeros_like(decoded, requires_grad=True))
            decoded = coded + (decoded - coded.detach()) + self.trace.shift
        return from_code_space(decoded, self.tables, rotated=False)


# What a part of a vector counts for: all the same, its Fisher information (what a small error of it costs), or the root of
# that, which is less at the mercy of the few tokens that are drawn.
Weighting = Literal["equal", "root", "fisher"]
# Weight added to every cell, in means over the cells of a group.
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class CodecSums:
    """Sums over the vectors of every cell of one codec."""

    def __init__(self, tables: CodecTables, weighting: Weighting) -> None:
        self._tables, self._weighting = tables, weighting
        self._groups = [_GroupSums(group, tables.num_heads) for stage in tables.layout.stages for group in stage]

    def add(self, half: int, codes: Sequence[torch.Tensor], error: torch.Tensor, score: torch.Tensor) -> None:
        """Count vectors into half 0 or 1.

        Parameters
        ----------
        half
            Which.
        codes
            [B, Hkv, M, T] of every group in storage order.
        error
            What the decoded vectors lack in code space, [B, Hkv, T, D].
        score
            Gradient of the log-likelihood of tokens drawn from the model with respect to the decoded vectors, [B, Hkv, T, D];
            the mean of its square is the Fisher information.
        """
        for sums, own_codes, (_, _, group, _, start) in zip(self._groups, codes, self._tables.layout.spans(), strict=True):
            channels = slice(start, start + group.num_channels)
            weight = _weight(score[..., channels], group.num_subspaces, self._weighting)
            sums.add(half, own_codes, error[..., channels], weight)

    def steps(self) -> list[torch.Tensor]:
        """Return the step [Hkv, M, ksub, dsub] fp32 of every group."""
        return [sums.step() for sums in self._groups]


def moved(tables: CodecTables, steps: Sequence[torch.Tensor]) -> CodecTables:
    """Return `tables` with `steps` added to their codebooks, as an artifact stores them.

    Raises
    ------
    DataError
        If centroids leave the range of fp16.
    """
    left = iter(steps)
    codebooks = tuple(
        tuple(stored(table.float() + next(left).to(table.device)) for table in stage) for stage in tables.codebooks
    )
    return replace(tables, codebooks=codebooks)


class _GroupSums:
    """Of the ``R = Hkv * M * ksub`` cells of one group, by half: weighted errors [2, R, dsub] and weights [2, R]."""

    def __init__(self, group: CodeGroup, num_heads: int) -> None:
        self._shape = (num_heads, group.num_subspaces, group.num_centroids, group.subspace_dim)
        rows = num_heads * group.num_subspaces * group.num_centroids
        self._errors, self._weights = torch.zeros(2, rows, group.subspace_dim), torch.zeros(2, rows)

    def add(self, half: int, codes: torch.Tensor, error: torch.Tensor, weight: torch.Tensor) -> None:
        num_heads, num_subspaces, num_centroids, dim = self._shape
        first = torch.arange(num_heads * num_subspaces, device=codes.device).view(num_heads, num_subspaces, 1)
        rows = (codes + first * num_centroids).flatten().cpu()
        parts = error.unflatten(-1, (num_subspaces, dim)).transpose(2, 3)  # [B, Hkv, M, T, dsub]
        self._errors[half].index_add_(0, rows, (parts * weight[..., None]).reshape(-1, dim).cpu())
        self._weights[half].index_add_(0, rows, weight.flatten().cpu())

    def step(self) -> torch.Tensor:
        mean = self._weights.mean()
        gains = [sum(self._gain(half, damping * mean) for half in (0, 1)) for damping in DAMPINGS]
        best = max(range(len(gains)), key=gains.__getitem__)
        if not gains[best] > 0:
            return torch.zeros(self._shape)
        step: torch.Tensor = self._errors.sum(0) / (self._weights.sum(0) + DAMPINGS[best] * mean)[:, None]
        return step.view(self._shape)

    def _gain(self, half: int, added: torch.Tensor) -> float:
        """Return what the step of the other half would take off the weighted squared error of this one; NaN without weight."""
        step = self._errors[1 - half] / (self._weights[1 - half] + added)[:, None]
        change = 2 * self._errors[half] * step - self._weights[half, :, None] * step.square()
        return float(change.sum(dtype=torch.float64))


def _weight(score: torch.Tensor, num_subspaces: int, weighting: Weighting) -> torch.Tensor:
    """Return the weight [B, Hkv, M, T] of every part of the vectors that `score` [B, Hkv, T, M * dsub] belongs to."""
    information: torch.Tensor = score.float().unflatten(-1, (num_subspaces, -1)).square().mean(dim=-1).transpose(2, 3)
    if weighting == "equal":
        return torch.ones_like(information)
    return information.sqrt() if weighting == "root" else information


_LN2 = 0.6931471805599453


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
            start, candidates = [codec.tables for codec in self.codecs], []
            for name in weightings:
                self.set_tables([moved(tables, own.steps()) for tables, own in zip(start, sums[name], strict=True)])
                candidates.append((fmean(self.divergences(selection)), name, [codec.tables for codec in self.codecs]))
            best, name, tables = min(candidates, key=lambda candidate: candidate[0])
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
        divergences = []
        for window in windows:
            exact = self.logits(window, "exact").log_softmax(-1)
            coded = self.logits(window, "coded").log_softmax(-1)
            divergences.append(float((exact.exp() * (exact - coded)).sum(-1).mean()) / _LN2)
            self.counter.step()
        return tuple(divergences)

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
