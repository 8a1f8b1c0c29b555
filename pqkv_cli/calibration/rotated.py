"""Calibration samples with the keys of some layers as a cache is given them. Knows the store and angles; no model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pqkv_cli.calibration.store import CalibrationStore, LayerSamples
from pqkv_cli.models.rotary import AngleSource
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.rotary import rotate


def rotated(keys: torch.Tensor, positions: torch.Tensor, angles: AngleSource, rotary: RotaryLayout) -> torch.Tensor:
    """Return `keys` [Hkv, N, D] as the cache sees them at `positions` [N]: after rotary embedding."""
    cos, sin = angles(positions.long()[None])
    return rotate(keys, cos, sin, rotary)


class RotatedStore(CalibrationStore):
    """A finished calibration whose keys of the layers in `turned` are given after rotary embedding, in fp32.

    Raises
    ------
    RunError
        As `CalibrationStore`.
    """

    def __init__(self, directory: Path | str, turned: Mapping[int, tuple[AngleSource, RotaryLayout]]) -> None:
        super().__init__(directory)
        self._turned = turned

    def layer(self, index: int) -> LayerSamples:
        """Return the samples of one layer; see `CalibrationStore.layer`."""
        samples = super().layer(index)
        if index not in self._turned:
            return samples
        keys = rotated(samples.keys.float(), samples.positions, *self._turned[index])
        return replace(samples, keys=keys, key_space="post_rope")
