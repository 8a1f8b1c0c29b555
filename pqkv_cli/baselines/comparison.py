"""Several ways to quantize one cache, fitted to the same samples and judged side by side. Knows no files.

All of them see the same windows, and the uncompressed model runs once per window for all. Mode ``all``: every key and value
of every token is quantized, but for the tokens that a method keeps and pays for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np
import torch

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.baselines.protocol import Rival, RivalCodec, Samples, StoredBits
from pqkv_cli.baselines.registry import is_at_rest
from pqkv_cli.calibration.store import LayerSamples, SampleStore, rotated
from pqkv_cli.errors import DataError, PqkvError
from pqkv_cli.evaluation.perplexity import perplexity_metric
from pqkv_cli.evaluation.record import OURS, SCHEMA, circumstances, codec_bits, model_facts
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject
from pqkv_cli.evaluation.text_windows import (
    Divergence,
    check_context,
    diverge,
    divergence_metrics,
    positions_of,
    scored,
    windows_of,
)
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.quantizers.codec import VectorCodec
from pqkv_cli.reporter import Advance
from pqkv_cli.runtime.attach import artifact_codecs, simulate
from pqkv_cli.specs import SIDES, LayerGeometry, Side
from pqkv_kernels.format.layout import RotaryLayout

LayerCodecs = dict[Side, RivalCodec]
Codecs = Sequence[dict[Side, VectorCodec] | None]


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


class Metered:
    """A rival's codec that counts the bits of all it was ever asked to store."""

    def __init__(self, codec: RivalCodec) -> None:
        self._codec = codec
        self.stored = StoredBits()

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        return self._codec.rotary

    @property
    def bits_per_channel(self) -> float:
        """Bits of a quantized token."""
        return self._codec.bits_per_channel

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return what vectors [B, Hkv, T, D] become."""
        stored = self._codec.encode(x)
        self.stored += stored.bits
        return self._codec.decode(stored)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the comparison.

    Attributes
    ----------
    method, native_bits
        Its name, and the bits per channel that it calls its own.
    codecs
        Of every layer, None where the layer stays dense.
    bits
        Returns the record's ``bits_per_channel``, once all windows are through.
    at_rest
        Whether its codes have to be rebuilt, layer after layer, before anyone attends to them.
    """

    method: str
    native_bits: float
    codecs: Codecs
    bits: Callable[[], dict[str, float]]
    table_bytes: int
    artifact_sha256: str | None = None
    fit_seconds: float | None = None
    at_rest: bool = False
    parts: list[Divergence] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name and rate, as ``--peers`` takes them."""
        return self.method if self.artifact_sha256 else f"{self.method}:{self.native_bits:g}"


def own_contestant(artifact: Artifact, name: str = OURS) -> Contestant:
    """Return the row of an artifact of ours."""
    bits = codec_bits(artifact)
    return Contestant(name, bits.codes, artifact_codecs(artifact), bits.document, artifact.table_bytes, artifact.sha256)


def rival_contestant(rival: Rival, source: SampleStore, model: Any, seed: int) -> Contestant:
    """Return the row of `rival`, fitted on `source`; where it cannot be fitted, the row says why and has no codecs."""
    started = time.perf_counter()
    try:
        fitted = fit_rival(rival, source, model, seed)
    except PqkvError as error:
        return Contestant(rival.name, rival.nbits, (), dict, 0, failures=[str(error)])
    codecs = [None if layer is None else {side: Metered(codec) for side, codec in layer.items()} for layer in fitted]
    meters = [codec for layer in codecs if layer for codec in layer.values()]
    nominal = fmean([meter.bits_per_channel for meter in meters])
    tables = sum(codec.table_bytes for layer in fitted if layer for codec in layer.values())
    seconds, at_rest = time.perf_counter() - started, is_at_rest(rival.name)

    def bits() -> dict[str, float]:
        return _document(sum((meter.stored for meter in meters), StoredBits()), nominal)

    return Contestant(rival.name, rival.nbits, _widened(codecs), bits, tables, fit_seconds=seconds, at_rest=at_rest)


@torch.no_grad()
def compare(
    subject: Subject,
    settings: EvaluationSettings,
    contestants: Sequence[Contestant],
    on_progress: Advance,
) -> int:
    """Let every contestant see the windows of the text, collecting its divergences; return how many tokens there were.

    Raises
    ------
    DataError
        If the text is too short, or the uncompressed model's logits are not finite.
    """
    check_context(subject, settings.context)
    windows = windows_of(subject, settings)
    model = subject.model
    for index, window in enumerate(windows):
        ids = window[None].to(model.device)
        baseline = model(ids, position_ids=positions_of(ids, settings), use_cache=False).logits[0]
        diverge(baseline[:1], baseline[:1], ids[0, 1:2])  # a broken model is nobody's failure but its own
        for contestant in contestants:
            if not contestant.failures:
                _judge(model, ids, settings, baseline, contestant)
        on_progress(index + 1, len(windows))
    return int(windows.numel())


def _judge(model: Any, ids: torch.Tensor, settings: EvaluationSettings, baseline: torch.Tensor, own: Contestant) -> None:
    counted = scored(settings)
    try:
        with simulate(model, own.codecs) as simulation:
            cache = simulation.new_cache()
            logits = model(
                ids, position_ids=positions_of(ids, settings), **cache_argument(model, cache), use_cache=True
            ).logits[0]
        own.parts.append(diverge(baseline[:-1][counted], logits[:-1][counted], ids[0, 1:][counted]))
    except PqkvError as error:
        own.failures.append(str(error))


def metrics(parts: Sequence[Divergence], seed: int) -> dict[str, Any]:
    """Return the metrics of a contestant's windows, as the perplexity task has them.

    Raises
    ------
    DataError
        If there is no window.
    """
    if not parts:
        raise DataError("no window was measured; expected at least one")
    rows = {f.name: np.stack([getattr(part, f.name).numpy() for part in parts]) for f in fields(Divergence)}
    return divergence_metrics(rows, seed) | {"perplexity": perplexity_metric(rows, seed)}


def _document(stored: StoredBits, nominal: float) -> dict[str, float]:
    channels = max(1, stored.num_channels)
    parts = {
        "codes": stored.codes / channels,
        "scales": stored.scales / channels,
        "outliers": stored.outliers / channels,
        "exact_tokens": stored.exact_tokens / channels,
    }
    return {"total": sum(parts.values()), **parts, "positions": 0.0, "asymptotic": nominal}


def _widened(codecs: Sequence[Any]) -> Codecs:
    # A dictionary of one class is no dictionary of its protocol: mutable mappings do not vary with their values.
    return codecs


TASK = "perplexity"
MODE: Mode = "all"


def peer_records(
    subject: Subject, settings: EvaluationSettings, contestants: Sequence[Contestant], num_tokens: int
) -> list[dict[str, Any]]:
    """Return one record (``pqkv.result/1``) per contestant; `method` names it, ``native_bits`` is its rate.

    A contestant that could not be fitted or gave no finite logits has the status ``unavailable`` and an ``error``.
    """
    return [_record(subject, settings, contestant, num_tokens) for contestant in contestants]


def _record(subject: Subject, settings: EvaluationSettings, own: Contestant, num_tokens: int) -> dict[str, Any]:
    failed = bool(own.failures)
    return {
        "schema": SCHEMA,
        "task": TASK,
        "mode": MODE,
        "method": own.method,
        "native_bits": own.native_bits,
        "at_rest": own.at_rest,
        "status": "unavailable" if failed else "complete",
        **({"error": own.failures[0]} if failed else {}),
        "model": model_facts(subject),
        "artifact_sha256": own.artifact_sha256,
        "bits_per_channel": {} if failed else own.bits(),
        "table_bytes": own.table_bytes,
        "cache_bytes": {"baseline": 0, "quantized": 0, "num_tokens": 0},
        "metrics": {} if failed else metrics(own.parts, settings.seed),
        "cost": {"fit_seconds": own.fit_seconds},
        **circumstances(subject, settings, num_tokens),
    }
