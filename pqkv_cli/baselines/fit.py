"""Rivals calibrated on the same samples as we are. Knows the calibration store and the model's angles; no metric."""

from collections.abc import Sequence
from typing import Any

import torch

from pqkv_cli.baselines.protocol import Rival, RivalCodec, Samples
from pqkv_cli.calibration.rotated import rotated
from pqkv_cli.calibration.store import LayerSamples, SampleStore
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.specs import SIDES, LayerGeometry, Side
from pqkv_kernels.format.layout import RotaryLayout

LayerCodecs = dict[Side, RivalCodec]


def fit_rival(rival: Rival, source: SampleStore, model: Any, seed: int) -> list[LayerCodecs | None]:
    """Return the fitted codecs of `rival` for every layer of `model`, None where the layer stays dense.

    Raises
    ------
    UnsupportedModelError
        If the rival does not exist for the model's shapes.
    DataError
        If there are too few samples.
    """
    layers = geometry(model.config).layers
    coded = [index for index, layer in enumerate(layers) if not layer.dense_reason]
    fitted: list[LayerCodecs | None] = [None] * len(layers)
    for side in SIDES:
        samples = [_samples(rival, source.layer(index), layers[index], model, index, side) for index in coded]
        for index, codec in zip(coded, rival.fit(side, samples, seed), strict=True):
            fitted[index] = {**(fitted[index] or {}), side: codec}
    return fitted


def _samples(rival: Rival, samples: LayerSamples, layer: LayerGeometry, model: Any, index: int, side: Side) -> Samples:
    weight = samples.attention_mass.float()
    if side == "values":
        return Samples(samples.values.float(), weight, _diagonal(samples.output_gram))
    if layer.rotary is None:
        return Samples(samples.keys.float(), weight, _diagonal(samples.query_moment))
    if rival.space("keys") == "pre_rope":
        return Samples(samples.keys.float(), weight, _before_rotation(samples, layer.rotary), layer.rotary)
    keys = rotated(samples.keys.float(), samples.positions, rotary_angles(model, index), layer.rotary)
    return Samples(keys, weight, _diagonal(samples.query_moment))


def _diagonal(moment: torch.Tensor) -> torch.Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).float()


def _before_rotation(samples: LayerSamples, rotary: RotaryLayout) -> torch.Tensor:
    """Return what errors of the channels of keys before rotary embedding are multiplied with, [Hkv, D]."""
    weight = _diagonal(samples.query_moment).clone()
    pairs: Sequence[tuple[int, int]] = rotary.pairs()
    first, second = torch.tensor(pairs).unbind(1)
    weight[:, first], weight[:, second] = samples.pair_moment[..., 0, 0].float(), samples.pair_moment[..., 1, 1].float()
    return weight
