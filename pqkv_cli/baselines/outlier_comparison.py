"""The outlier test: the same model with and without outliers, and what each method makes of them. Knows gauges and codecs.

Rivals are calibrated on the samples of the model with outliers. These need no second run of the model: a gauge maps keys,
values and moments linearly, and with powers of two exactly, so they are the samples that calibration would have drawn.

Our own codecs are taken over: the map of an artifact undoes the gauge, and that again exactly. Fitting on the model with
outliers gives the same codebooks and codes, bit for bit, which is tested.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.baselines.comparison import MODE, TASK, Codecs, Contestant, compare, own_contestant, peer_records
from pqkv_cli.baselines.outliers import OUTLIER_SHARE, LayerGauge, check_scale, injected, outlier_gauges
from pqkv_cli.baselines.protocol import Rival
from pqkv_cli.baselines.registry import METHODS, parse_rivals
from pqkv_cli.baselines.run import fitted_rivals, open_comparison
from pqkv_cli.calibration.store import LayerSamples, SampleStore
from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.files import write_text
from pqkv_cli.models.geometry import geometry
from pqkv_cli.pipeline.evaluation_settings import task_settings
from pqkv_cli.pipeline.rundir import PEERS_FOLDER
from pqkv_cli.pipeline.start import Source
from pqkv_cli.quantizers.codec import PredictedCodec, VectorCodec
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import LayerGeometry, Side
from pqkv_kernels.format.layout import RotaryLayout


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
        return self._codec.encode_decode(self._plain(x)) @ self._forward.to(x.device).mT

    def encode_decode_with(self, x: torch.Tensor, keys: torch.Tensor, key_codec: VectorCodec) -> torch.Tensor:
        """Return what values become beside their decoded keys, which a codec of the same kind decoded."""
        if not isinstance(self._codec, PredictedCodec) or not isinstance(key_codec, GaugedCodec):
            return self.encode_decode(x)
        decoded = self._codec.encode_decode_with(self._plain(x), key_codec._plain(keys), key_codec._codec)
        return decoded @ self._forward.to(x.device).mT

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self._inverse.to(x.device).mT


class GaugedSource:
    """The calibration that the model with outliers would have."""

    def __init__(self, source: SampleStore, gauges: Mapping[int, LayerGauge], layers: Sequence[LayerGeometry]) -> None:
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


Record = dict[str, Any]
FILE = "outliers.json"
# Shown where no rivals are named, at the rate nearest to the artifact's.
USUAL_RIVALS = ("million", "rtn", "kivi", "kvquant", "turboquant", "rotatekv")


@dataclass(frozen=True, slots=True)
class OutlierTest:
    """What came of it: records of the same contestants `without` and `with_outliers`, in the same order.

    `largest_difference` is between the uncompressed logits without and with outliers; 0 says they are equal bit for bit.
    """

    scale: float
    share: float
    largest_difference: float
    without: list[Record]
    with_outliers: list[Record]
    file: Path


def outlier_test(source: Source, wanted: str | None, scale: float, reporter: Reporter, *, force: bool = False) -> OutlierTest:
    """Measure the artifact of `source` and rivals on its model as it is and with outliers of `scale` put into it.

    Raises
    ------
    UsageError
        If `scale` is no power of two, a rival is unknown, or `source` is no run.
    UnsupportedModelError
        If outliers cannot be put into the model without changing it.
    DataError
        If the text cannot be used, or outliers do not fit half precision.
    """
    check_scale(scale)
    named = parse_rivals(wanted) if wanted is not None else None
    store, subject, artifacts = open_comparison(source, (), reporter, force=force)
    gauges = outlier_gauges(subject.model, scale, source.recipe.seed)
    settings = task_settings(TASK, MODE, source.recipe, subject)
    own = own_contestant(artifacts[0][1])
    rivals = named if named is not None else _usual(own)

    def measure(contestants: Sequence[Contestant], label: str) -> list[Record]:
        with reporter.progress(label) as advance:
            num_tokens = compare(subject, settings, contestants, advance)
        return peer_records(subject, settings, contestants, num_tokens)

    plain = [own, *fitted_rivals(rivals, store, subject, source.recipe.seed, reporter)]
    without = measure(plain, "without outliers")
    ids, logits = _first_logits(subject, settings)
    with injected(subject.model, gauges):
        difference = largest_difference(subject.model, ids, logits)
        gauged = GaugedSource(store, gauges, geometry(subject.model.config).layers)
        loud = [own_with_outliers(own, gauges), *fitted_rivals(rivals, gauged, subject, source.recipe.seed, reporter)]
        records = measure(loud, f"with outliers of {scale:g}")
    test = OutlierTest(scale, OUTLIER_SHARE, difference, without, records, source.results / PEERS_FOLDER / FILE)
    write_text(test.file, json.dumps(document(test), indent=1) + "\n")
    return test


def document(test: OutlierTest) -> dict[str, Any]:
    """Return the test as plain data."""
    return {
        "schema": "pqkv.outliers/1",
        "scale": test.scale,
        "share": test.share,
        "largest_logit_difference": test.largest_difference,
        "without": test.without,
        "with_outliers": test.with_outliers,
    }


def _usual(own: Contestant) -> list[Rival]:
    """Return the usual rivals at the native rate nearest to ours."""
    chosen = []
    for name in USUAL_RIVALS:
        rate = min(METHODS[name].rates, key=lambda bits: (abs(bits - own.native_bits), -bits))
        chosen.append(METHODS[name].make(rate))
    return chosen


@torch.no_grad()
def _first_logits(subject: Subject, settings: EvaluationSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first window [1, T] and the uncompressed model's logits of it."""
    windows = token_windows(subject.tokenizer, subject.text, 1, settings.context, settings.seed, at_most=True)
    ids = windows[:1].to(subject.model.device)
    return ids, subject.model(ids, use_cache=False).logits
