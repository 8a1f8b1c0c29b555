"""The outlier test: the same model with and without outliers, and what each method makes of them. Knows gauges and codecs.

Rivals are calibrated on the samples of the model with outliers. These need no second run of the model: a gauge maps keys,
values and moments linearly, and with powers of two exactly, so they are the samples that calibration would have drawn.

Our own codecs are taken over: the map of an artifact undoes the gauge, and that again exactly. Fitting on the model with
outliers gives the same codebooks and codes, bit for bit, which is tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.peers import Codecs, Contestant
from pqkv_cli.evaluation.peers_fit import SampleSource
from pqkv_cli.models.gauge import LayerGauge
from pqkv_cli.quantizers.codec import VectorCodec
from pqkv_cli.specs import LayerGeometry, Side
from pqkv_kernels.layout import RotaryLayout


class GaugedCodec:
    """A codec of the model without outliers, for the one with: its map is preceded by the inverse of the gauge.

    Parameters
    ----------
    codec
        Fitted without outliers.
    forward, inverse
        The gauge and its inverse, [Hkv, D, D].
    """

    def __init__(self, codec: VectorCodec, forward: torch.Tensor, inverse: torch.Tensor) -> None:
        self._codec, self._forward, self._inverse = codec, forward.float(), inverse.float()

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        return self._codec.rotary

    @property
    def bits_per_channel(self) -> float:
        """Bits of code per channel."""
        return self._codec.bits_per_channel

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return what vectors [B, Hkv, T, D] become."""
        plain = x.float() @ self._inverse.to(x.device).mT
        return self._codec.encode_decode(plain) @ self._forward.to(x.device).mT


class GaugedSource:
    """The calibration that the model with outliers would have."""

    def __init__(self, source: SampleSource, gauges: Mapping[int, LayerGauge], layers: Sequence[LayerGeometry]) -> None:
        self._source, self._gauges, self._layers = source, gauges, layers

    def layer(self, index: int) -> LayerSamples:
        """Return the samples of one layer.

        Raises
        ------
        DataError
            If outliers do not fit the half precision of samples.
        """
        return gauged_samples(self._source.layer(index), self._gauges[index], self._layers[index].rotary, index)


def gauged_samples(samples: LayerSamples, gauge: LayerGauge, rotary: RotaryLayout | None, index: int) -> LayerSamples:
    """Return `samples` of layer `index` as they would be under `gauge`.

    Raises
    ------
    DataError
        If outliers do not fit the half precision of samples.
    """
    queries, outputs = gauge.query_map, gauge.output_map
    return replace(
        samples,
        keys=_half(samples.keys.double() @ gauge.key_map.mT, "keys", index),
        values=_half(samples.values.double() @ gauge.value_map.mT, "values", index),
        query_moment=queries @ samples.query_moment @ queries.mT,
        pair_moment=_pair_moment(samples.pair_moment, queries, rotary),
        output_gram=outputs.mT @ samples.output_gram @ outputs,
        # Gradients go the way of what multiplies keys and values; what an error costs stays.
        key_fisher=None if samples.key_fisher is None else queries @ samples.key_fisher @ queries.mT,
        value_fisher=None if samples.value_fisher is None else outputs.mT @ samples.value_fisher @ outputs,
    )


def own_with_outliers(own: Contestant, gauges: Mapping[int, LayerGauge]) -> Contestant:
    """Return one of our rows for the model with outliers."""
    codecs: Codecs = [None if layer is None else _gauged(layer, gauges[index]) for index, layer in enumerate(own.codecs)]
    return replace(own, codecs=codecs, parts=[], failures=[])


@torch.no_grad()
def largest_difference(model: Any, ids: torch.Tensor, before: torch.Tensor) -> float:
    """Return how far the logits of `ids` [1, T] are from those `before`, at most; 0 where they are equal bit for bit."""
    return float((model(ids, use_cache=False).logits.double() - before.double()).abs().max())


def _gauged(layer: Mapping[Side, VectorCodec], gauge: LayerGauge) -> dict[Side, VectorCodec]:
    # A gauge of keys commutes with rotary embedding, so it does not matter on which side of it the codec works.
    return {
        "keys": GaugedCodec(layer["keys"], gauge.key_map, gauge.query_map.mT),
        "values": GaugedCodec(layer["values"], gauge.value_map, gauge.output_map),
    }


def _pair_moment(moment: torch.Tensor, query_map: torch.Tensor, rotary: RotaryLayout | None) -> torch.Tensor:
    """Return the moments [Hkv, P, 2, 2] of queries turned back to their keys, under the map of the queries."""
    if rotary is None:
        return moment
    pairs = torch.tensor(rotary.pairs())
    blocks = query_map[:, pairs[:, :, None], pairs[:, None, :]]  # [Hkv, P, 2, 2]
    mapped: torch.Tensor = blocks @ moment.double() @ blocks.mT
    return mapped


def _half(vectors: torch.Tensor, what: str, index: int) -> torch.Tensor:
    half = vectors.half()
    if not bool(torch.isfinite(half).all()):
        raise DataError(
            f"the {what} of layer {index} with outliers reach {float(vectors.abs().max()):.6g}, more than half precision can "
            "hold; expected at most 65504; choose a smaller --inject-outliers"
        )
    return half
