"""Codec tables of one layer from its calibration samples. Knows maps and codebooks; nothing of files or other layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.quantizers.grouping import balanced_pairs
from pqkv_cli.quantizers.maps import metric_rotation, pair_metric, pair_scale, range_factor
from pqkv_cli.quantizers.product import Codebooks, fit_product, relative_error
from pqkv_cli.specs import SIDES, CodecSpec, LayerGeometry, Side
from pqkv_kernels.codec import to_code_space
from pqkv_kernels.layout import CodeLayout, RotaryLayout
from pqkv_kernels.tables import CodecTables


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """What fitting one layer gives; both mappings are empty for a layer that stays dense.

    Attributes
    ----------
    tables
        The codec of the layer's keys and of its values.
    relative_error
        Unweighted ``||x - x'||^2 / ||x||^2`` in code space, where it is the error of logits and outputs, per KV head.
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
        _check_spec(specs[side], layer, index, side)
        try:
            _check_finite(samples.keys if side == "keys" else samples.values)
            tables[side], error = _fit_side(samples, layer, specs[side], side, index, settings)
        except DataError as cause:
            raise DataError(f"layer {index}, {side}: {cause}") from cause
        errors[side] = tuple(error.tolist())
    return FittedLayer(tables, errors)


def sample_weights(mass: torch.Tensor, weighting: Weighting, damping: float) -> torch.Tensor | None:
    """Return the weight [Hkv, N] of each vector from its attention mass [Hkv, N], None where all count the same."""
    if weighting == "none":
        return None
    mean = mass.mean(dim=1, keepdim=True)
    relative = torch.where(mean > 0, mass / mean.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(mass))
    return (relative.sqrt() if weighting == "sqrt" else relative) + damping


def _fit_side(
    samples: LayerSamples, layer: LayerGeometry, spec: CodecSpec, side: Side, index: int, settings: FitSettings
) -> tuple[CodecTables, torch.Tensor]:
    """Return the tables of one side and their relative error [Hkv]."""
    vectors = (samples.keys if side == "keys" else samples.values).float()
    weights = sample_weights(samples.attention_mass.float(), settings.weighting(side), settings.damping)
    rotary = layer.rotary if spec.key_space == "pre_rope" else None
    tables = CodecTables(spec.layout, _blank(spec.layout, len(vectors)), rotary=rotary)
    matrix = _map(samples, vectors, weights, spec, side, rotary, settings)
    if matrix is not None:
        factor = range_factor(_coded(vectors, replace(tables, map=matrix)))
        tables = replace(tables, map=matrix * factor.view(-1, *[1] * (matrix.ndim - 1)), inverse=None)
    if rotary is not None:
        energy = _pair_energy(_coded(vectors, tables), weights, rotary)
        tables = replace(tables, permutation=balanced_pairs(energy, rotary, spec.layout))
    points = _coded(vectors, tables)
    seed = settings.derived_seed(index, side)
    codebooks = fit_product(points, spec.layout, weights=weights, iterations=settings.iterations, seed=seed)
    error = relative_error(points, spec.layout, codebooks)
    return replace(tables, codebooks=codebooks), error


def _map(
    samples: LayerSamples,
    vectors: torch.Tensor,
    weights: torch.Tensor | None,
    spec: CodecSpec,
    side: Side,
    rotary: RotaryLayout | None,
    settings: FitSettings,
) -> torch.Tensor | None:
    """Return the map `spec` asks for: from the query moment for keys, from the output projection for values."""
    gram = samples.query_moment if side == "keys" else samples.output_gram
    if spec.map == "identity":
        return None
    if spec.map == "scale":
        return pair_scale(gram, rotary)
    if spec.map == "blocks" and rotary is not None:
        return pair_metric(samples.pair_moment, samples.query_moment, rotary, vectors.shape[-1])
    if side == "values" and not settings.rotate_values:
        return metric_rotation(gram)
    wide = vectors.double()
    counted = wide if weights is None else wide * weights[..., None].double()
    return metric_rotation(gram, counted.mT @ wide / wide.shape[1], spec.layout)


def _coded(vectors: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    # Sampled keys are those before rotary embedding already.
    return to_code_space(vectors[None], tables, rotated=False)[0]


def _blank(layout: CodeLayout, num_heads: int) -> Codebooks:
    """Return codebooks of zeros that take no memory: maps are needed before codebooks exist."""
    zero = torch.zeros((), dtype=torch.float16)
    return tuple(
        tuple(zero.expand(num_heads, g.num_subspaces, g.num_centroids, g.subspace_dim) for g in stage)
        for stage in layout.stages
    )


def _pair_energy(mapped: torch.Tensor, weights: torch.Tensor | None, rotary: RotaryLayout) -> torch.Tensor:
    """Return the energy [Hkv, num_pairs] fp64 of each rotary pair of `mapped` [Hkv, N, D]: the root of its determinant.

    The distortion of a pair's codes goes with the area over which its vectors spread: a constant offset costs nothing, nor
    does the second axis of a pair that spreads along one.
    """
    first, second = torch.tensor(rotary.pairs()).unbind(1)
    pairs = torch.stack((mapped[..., first], mapped[..., second]), dim=-1).double()  # [Hkv, N, P, 2]
    counted = torch.ones(mapped.shape[:2], dtype=torch.float64) if weights is None else weights.double()
    shares = counted / counted.sum(dim=1, keepdim=True)
    mean = torch.einsum("hn,hnpi->hpi", shares, pairs)
    square = torch.einsum("hn,hnpi,hnpj->hpij", shares, pairs, pairs)
    covariance = square - mean[..., :, None] * mean[..., None, :]
    determinant: torch.Tensor = torch.linalg.det(covariance)
    return determinant.clamp(min=0).sqrt()


def _check_finite(vectors: torch.Tensor) -> None:
    finite = torch.isfinite(vectors).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise DataError(
            f"key/value head {int(torch.nonzero(~finite)[0])} has NaN or infinite activations; expected finite ones; check the "
            "model in this dtype (bfloat16 and float32 do not overflow where float16 does) and calibrate again"
        )


def _check_spec(spec: CodecSpec, layer: LayerGeometry, index: int, side: Side) -> None:
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
    if spec.key_space == "post_rope" and layer.rotary is not None:
        raise UsageError(
            f"layer {index}, keys: codes after rotary embedding are not fitted yet; expected the key space 'pre_rope'; a "
            "codebook learned after rotation would only hold at the positions it was learned at"
        )
