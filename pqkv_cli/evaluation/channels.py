"""How large each channel of keys and values gets, as the model makes them and in code space. Knows samples and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.dispatch import to_code_space

_MOST_VECTORS = 4096  # per head, so that the calibration of a large model is looked at in seconds


@dataclass(frozen=True, slots=True)
class ChannelPeaks:
    """Largest magnitude of each channel of one layer's keys (before rotary embedding) or values, [Hkv, D] each.

    `plain` as the model makes them, `coded` in the space where they are quantized.
    """

    layer: int
    side: Side
    plain: torch.Tensor
    coded: torch.Tensor


def channel_peaks(store: CalibrationStore, artifact: Artifact) -> list[ChannelPeaks]:
    """Return the peaks of every coded layer over the first sampled vectors; none where the calibration is of another model.

    Raises
    ------
    RunError
        If a file of the calibration is damaged.
    """
    if store.manifest.get("model", {}).get("weights_sha256") != artifact.header.model.weights_sha256:
        return []
    found = []
    for index, tables in enumerate(artifact.tables):
        if tables is None:
            continue
        for side in SIDES:
            vectors = store.first_vectors(index, side, _MOST_VECTORS).float()
            coded = to_code_space(vectors[None], tables[side], rotated=False)[0]
            found.append(ChannelPeaks(index, side, vectors.abs().amax(1), coded.abs().amax(1)))
    return found


def over_median(peaks: torch.Tensor) -> torch.Tensor:
    """Return `peaks` [Hkv, D] over the median channel of its head, the largest of all heads, [D]."""
    usual = peaks.median(dim=1, keepdim=True).values.clamp(min=torch.finfo(torch.float32).tiny)
    return (peaks / usual).amax(0)


def pooled(values: torch.Tensor, most: int) -> Sequence[float]:
    """Return `values` [D] as at most `most` numbers, the largest of each run of neighbours."""
    run = -(-len(values) // most)
    return [float(part.max()) for part in values.split(run)]
