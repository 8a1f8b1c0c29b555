"""Codebooks refined so that the quantized model says what the uncompressed one says. Knows a model and codecs; no files.

Keys and values of every layer are quantized at once. Each centroid moves to the mean of what the uncompressed model has where
the quantized one uses that code (Lloyd's step on the model's own stream), over far more text than samples are kept of, and
weighted by what errors cost. Divergences decide: which weights, how many rounds, and on text kept apart whether to keep it at
all. Only centroids move: maps, layouts and how codes are chosen stay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch

from pqkv_cli.calibration.fisher import frozen
from pqkv_cli.errors import UsageError
from pqkv_cli.fitting.fit import FittedLayer
from pqkv_cli.fitting.refine_work import PassCounter, RefineSettings, RefineWork, WatchedCodec, Weighting
from pqkv_cli.quantizers.codec import VectorCodec
from pqkv_cli.runtime.attach import simulate
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.format.tables import CodecTables

LayerCodecs = dict[Side, WatchedCodec]


@dataclass(frozen=True, slots=True)
class Refinement:
    """What refining came to.

    Attributes
    ----------
    layers
        Refined, or the given ones where `is_better` is not.
    is_better
        Whether the divergence on held-out windows fell by more than noise.
    before, after
        Divergence of every held-out window, bits per token.
    selection
        Mean divergence of the selection windows at the start and after each round that improved it.
    weighting
        What vectors counted for; None where no round improved anything.
    """

    layers: tuple[FittedLayer, ...]
    is_better: bool
    before: tuple[float, ...]
    after: tuple[float, ...]
    selection: tuple[float, ...]
    weighting: Weighting | None


def refine(
    model: Any,
    layers: Sequence[FittedLayer],
    windows: torch.Tensor,
    held_out: torch.Tensor,
    settings: RefineSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Refinement:
    """Refine the codebooks of `layers`, or keep them as they are.

    Parameters
    ----------
    model
        A transformers causal language model; it needs the memory of a backward pass over one window.
    layers
        What `fit_codebooks` gave, in order.
    windows
        Text to train on and, the last of it, to choose steps with, [N, T] int64.
    held_out
        Text that only decides whether the result is kept, [N, T] int64.
    settings
        How to refine.
    on_progress
        Called with (windows done, windows at most).

    Raises
    ------
    DataError
        If logits are not finite, or centroids leave the range of fp16.
    UsageError
        If there are fewer than four windows to train on.
    """
    settings = RefineSettings() if settings is None else settings
    if len(windows) < 4:
        raise UsageError(f"there are {len(windows)} windows to refine with; expected at least 4: calibrate on more text")
    num_selected = max(1, round(len(windows) * settings.selection_share))
    # The last windows are those that the fit has not seen, if there are any.
    training, selection = windows[:-num_selected], windows[-num_selected:]
    codecs = [_codecs(layer) for layer in layers]
    simulated: list[dict[Side, VectorCodec] | None] = [None if layer is None else {**layer} for layer in codecs]
    with frozen(model), simulate(model, simulated) as simulation:
        passes = 2 * len(held_out) + (settings.rounds + len(settings.weightings)) * len(selection)
        counter = PassCounter(passes + settings.rounds * len(training), on_progress)
        flat = [layer[side] for layer in codecs if layer is not None for side in SIDES]
        work = RefineWork(model, simulation, flat, settings, counter)
        before = work.divergences(held_out)
        selected, weighting = work.improve(training, selection)
        after = before if weighting is None else work.divergences(held_out)
    counter.end()
    if not is_better(before, after, settings):
        return Refinement(tuple(layers), False, before, after, selected, weighting)
    return Refinement(tuple(map(_refined, layers, codecs)), True, before, after, selected, weighting)


def is_better(before: Sequence[float], after: Sequence[float], settings: RefineSettings) -> bool:
    """Return whether `after` is lower than `before`, window by window, by more than chance gives (paired t-test)."""
    gains = [b - a for b, a in zip(before, after, strict=True)]
    if len(gains) < max(2, settings.least_held_out):
        return False
    return fmean(gains) > settings.least_errors * stdev(gains) / math.sqrt(len(gains))


def _codecs(layer: FittedLayer) -> LayerCodecs | None:
    return {side: WatchedCodec(layer.tables[side]) for side in SIDES} if layer.tables else None


def _refined(layer: FittedLayer, codecs: LayerCodecs | None) -> FittedLayer:
    if codecs is None:
        return layer
    cpu = torch.device("cpu")
    tables: Mapping[Side, CodecTables] = {
        side: replace(layer.tables[side], codebooks=codec.tables.to(cpu).codebooks) for side, codec in codecs.items()
    }
    return replace(layer, tables=tables, relative_error={side: codec.relative_error for side, codec in codecs.items()})
