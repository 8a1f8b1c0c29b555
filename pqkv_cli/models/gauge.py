"""What can change inside an attention layer without changing the model. Knows linear algebra; no modules.

Keys of a rotary pair may be scaled and turned if its queries are scaled back and turned along: rotary embedding turns pairs
too, and turns commute. Values of a head may pass through any invertible map that the output projection undoes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pqkv_cli.errors import UsageError
from pqkv_cli.specs import LayerGeometry
from pqkv_kernels.layout import RotaryLayout

# Share of the pairs, and of the value channels, that become outliers.
OUTLIER_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class LayerGauge:
    """Maps of one layer's heads, [Hkv, D, D] fp64 each: ``k -> key_map k``, ``q -> query_map q``, ``v -> value_map v``.

    Attributes
    ----------
    key_map, query_map
        ``query_map^T key_map = 1``.
    value_map, output_map
        ``output_map value_map = 1``; columns of the output projection are multiplied with `output_map`.
    turns
        Whether pairs are turned, not only scaled.
    """

    key_map: torch.Tensor
    query_map: torch.Tensor
    value_map: torch.Tensor
    output_map: torch.Tensor
    turns: bool = False


def layer_gauge(
    layer: LayerGeometry,
    *,
    pair_scale: torch.Tensor | None = None,
    pair_angle: torch.Tensor | None = None,
    value_map: torch.Tensor | None = None,
) -> LayerGauge:
    """Return the gauge that scales and turns the rotary pairs of keys and maps values.

    Parameters
    ----------
    layer
        The attention.
    pair_scale
        [Hkv, num_pairs], not zero; powers of two change no bit of the model's output. None scales nothing.
    pair_angle
        [Hkv, num_pairs], radians; None turns nothing.
    value_map
        [Hkv, D, D] invertible, or [Hkv, D] for one factor per channel; None leaves values alone.

    Raises
    ------
    UsageError
        If shapes do not fit the layer, a map cannot be inverted, or pairs are meant where there are none.
    """
    heads, dim = layer.num_kv_heads, layer.head_dim
    unit = torch.eye(dim, dtype=torch.float64).repeat(heads, 1, 1)
    keys, queries = unit, unit
    if pair_scale is not None or pair_angle is not None:
        keys, queries = _pair_maps(layer, pair_scale, pair_angle)
    values, outputs = unit, unit
    if value_map is not None:
        values, outputs = _value_maps(value_map.double().cpu(), heads, dim)
    return LayerGauge(keys, queries, values, outputs, pair_angle is not None)


def outlier_gauge(layer: LayerGeometry, scale: float, generator: torch.Generator, *, same_heads: bool = False) -> LayerGauge:
    """Return a gauge that makes outliers: `OUTLIER_SHARE` of the pairs of keys and of the value channels times `scale`.

    With `same_heads` all heads get the same pairs, as norms shared by the heads demand.
    """
    heads, dim = layer.num_kv_heads, layer.head_dim
    num_pairs = layer.rotary.num_pairs if layer.rotary is not None else 0
    pairs = _random_scales(heads, num_pairs, scale, generator)
    pairs = pairs[:1].expand(heads, -1) if same_heads else pairs
    values = _random_scales(heads, dim, scale, generator)
    return layer_gauge(layer, pair_scale=pairs if num_pairs else None, value_map=values)


def _random_scales(heads: int, count: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    chosen = max(1, round(OUTLIER_SHARE * count)) if count else 0
    rank = torch.rand(heads, count, generator=generator).argsort(dim=1)
    return torch.where(rank < chosen, float(scale), 1.0).double()


def _pair_maps(
    layer: LayerGeometry, scale: torch.Tensor | None, angle: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = layer.rotary
    if rotary is None:
        raise UsageError("a scale or an angle per rotary pair was given for a layer without rotary pairs; expected None")
    expected = (layer.num_kv_heads, rotary.num_pairs)
    for name, given in (("pair_scale", scale), ("pair_angle", angle)):
        if given is not None and tuple(given.shape) != expected:
            raise UsageError(f"{name} has shape {list(given.shape)}; expected {list(expected)}")
    scales = torch.ones(expected, dtype=torch.float64) if scale is None else scale.double().cpu()
    angles = torch.zeros(expected, dtype=torch.float64) if angle is None else angle.double().cpu()
    if not bool((torch.isfinite(scales) & (scales != 0) & torch.isfinite(angles)).all()):
        raise UsageError("pair_scale holds zeros, or it or pair_angle is not finite; expected finite factors other than zero")
    return _blocks(layer, rotary, scales, angles), _blocks(layer, rotary, 1 / scales, angles)


def _blocks(layer: LayerGeometry, rotary: RotaryLayout, scales: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return [Hkv, D, D]: every pair scaled and turned, other channels as they are."""
    matrix = torch.eye(layer.head_dim, dtype=torch.float64).repeat(layer.num_kv_heads, 1, 1)
    pairs: Sequence[tuple[int, int]] = rotary.pairs()
    first, second = torch.tensor(pairs).unbind(1)
    cos, sin = scales * angles.cos(), scales * angles.sin()
    matrix[:, first, first], matrix[:, second, second] = cos, cos
    matrix[:, first, second], matrix[:, second, first] = -sin, sin
    return matrix


def _value_maps(given: torch.Tensor, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    if tuple(given.shape) not in ((heads, dim), (heads, dim, dim)):
        raise UsageError(f"value_map has shape {list(given.shape)}; expected {[heads, dim]} or {[heads, dim, dim]}")
    if given.ndim == 2 and bool((given != 0).all()):
        return torch.diag_embed(given), torch.diag_embed(1 / given)
    matrix = torch.diag_embed(given) if given.ndim == 2 else given
    inverse, info = torch.linalg.inv_ex(matrix)
    if bool(info.any()) or not bool(torch.isfinite(inverse).all()):
        head = int(torch.nonzero(info)[0]) if bool(info.any()) else 0
        raise UsageError(f"value_map of head {head} cannot be inverted; expected an invertible map")
    return matrix, inverse
