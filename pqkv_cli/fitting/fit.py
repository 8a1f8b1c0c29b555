"""Codec tables of one layer from its calibration samples. Knows what a layer allows; nothing of files or other layers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.side import fit_side
from pqkv_cli.specs import SIDES, CodecSpec, KeySpace, LayerGeometry, Side
from pqkv_kernels.tables import CodecTables


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """What fitting one layer gives; both mappings are empty for a layer that stays dense.

    Attributes
    ----------
    tables
        The codec of the layer's keys and of its values.
    relative_error
        Unweighted ``||x - x'||^2 / ||x||^2`` in code space, where it is the error of logits and outputs, per KV head; on
        vectors that nothing was fitted to, unless there are very few.
    """

    tables: Mapping[Side, CodecTables]
    relative_error: Mapping[Side, tuple[float, ...]]


def fit_layer(
    samples: LayerSamples,
    layer: LayerGeometry,
    specs: Mapping[Side, CodecSpec],
    *,
    index: int = 0,
    settings: FitSettings | None = None,
) -> FittedLayer:
    """Fit the codecs of one layer.

    Parameters
    ----------
    samples
        The layer's calibration samples.
    layer
        Its attention.
    specs
        The format of its keys and of its values.
    index
        Number of the layer: for the seed and for messages.
    settings
        How to fit.

    Raises
    ------
    DataError
        If samples are degenerate or fewer than centroids; the message names the layer.
    UsageError
        If a format does not fit the layer.
    """
    settings = FitSettings() if settings is None else settings
    tables: dict[Side, CodecTables] = {}
    errors: dict[Side, tuple[float, ...]] = {}
    for side in SIDES:
        _check_spec(specs[side], layer, samples.key_space, index, side)
        with checked_side(samples, index, side):
            tables[side], error = fit_side(samples, layer, specs[side], side, index, settings)
        errors[side] = tuple(error.tolist())
    return FittedLayer(tables, errors)


@contextmanager
def checked_side(samples: LayerSamples, index: int, side: Side) -> Iterator[None]:
    """Refuse activations that are not finite, and name layer and side in every error of the samples.

    Raises
    ------
    DataError
        If the samples are at fault.
    """
    try:
        _check_finite(samples.keys if side == "keys" else samples.values)
        yield
    except DataError as cause:
        raise DataError(f"layer {index}, {side}: {cause}") from cause


def _check_finite(vectors: torch.Tensor) -> None:
    finite = torch.isfinite(vectors).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise DataError(
            f"key/value head {int(torch.nonzero(~finite)[0])} has NaN or infinite activations; expected finite ones; check the "
            "model in this dtype (bfloat16 and float32 do not overflow where float16 does) and calibrate again"
        )


def _check_spec(spec: CodecSpec, layer: LayerGeometry, sampled: KeySpace, index: int, side: Side) -> None:
    if spec.layout.head_dim != layer.head_dim:
        raise UsageError(
            f"layer {index}, {side}: the codec covers {spec.layout.head_dim} channels; expected head_dim {layer.head_dim}; "
            "plan a codec of its own for layers of this width"
        )
    if side == "values":
        return
    if spec.key_space == "pre_rope" and (layer.rotary is None or spec.map == "matrix"):
        found = "a matrix map" if layer.rotary is not None else "a layer without rotary embedding"
        raise UsageError(
            f"layer {index}, keys: found {found} for codes before rotary embedding; expected rotary keys and the map "
            "'blocks', 'scale' or 'identity'; plan this layer with the key space 'post_rope'"
        )
    if layer.rotary is not None and spec.key_space != sampled:
        raise UsageError(
            f"layer {index}, keys: found samples in the key space {sampled!r} for codes in {spec.key_space!r}; expected the "
            "same; take them from a RotatedStore where keys are coded after rotary embedding"
        )
