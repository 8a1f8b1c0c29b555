"""Outliers put into a model without changing it: scales of keys and values that its projections take back.

Keys of a rotary pair may be scaled and rotated if its queries are scaled back and rotated along: rotary embedding rotates pairs
too, and rotations of one pair commute. Values of a head may pass through any invertible map that the output projection undoes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pqkv_cli.errors import UnsupportedModelError, UsageError
from pqkv_cli.hf.configs import text_config
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.models.geometry import geometry
from pqkv_cli.specs import LayerGeometry
from pqkv_kernels.format.layout import RotaryLayout

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


_OUTPUTS = ("o_proj", "out_proj", "dense")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = "qkv_proj"  # rows of queries, then keys, then values
_QUERY_NORMS, _KEY_NORMS = ("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")


@dataclass(frozen=True, slots=True)
class Projections:
    """Weights and, where there are any, biases of one attention module, as views that can be written to.

    `output` holds the weight alone: its bias is added after the heads. Norms are those between projection and rotary
    embedding, None where there are none.
    """

    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    output: tuple[torch.Tensor]
    query_norm: nn.Module | None
    key_norm: nn.Module | None


def projections_of(module: nn.Module, layer: LayerGeometry, index: int) -> Projections:
    """Return the projections of an attention module.

    Raises
    ------
    UnsupportedModelError
        If they are not plain linear layers of known names and shapes, or norms are not of a kind that scales pass through.
    """
    children = dict(module.named_children())
    output = next((children[name] for name in _OUTPUTS if name in children), None)
    sizes = [layer.num_heads * layer.head_dim, *[layer.num_kv_heads * layer.head_dim] * 2]
    if all(name in children for name in _SEPARATE):
        rows = [_rows(children[name], name, size, index) for name, size in zip(_SEPARATE, sizes, strict=True)]
    elif _FUSED in children:
        fused = _rows(children[_FUSED], _FUSED, sum(sizes), index)
        rows = [tuple(parts) for parts in zip(*(tensor.split(sizes) for tensor in fused), strict=True)]
    else:
        raise _unknown(index, f"the children {', '.join(children) or 'none'}", f"{', '.join(_SEPARATE)} or {_FUSED}")
    if not isinstance(output, nn.Linear) or tuple(output.weight.shape[1:]) != (sizes[0],):
        raise _unknown(index, "no linear output projection over all heads", f"one of {', '.join(_OUTPUTS)}")
    norms = norms_of(module, index)
    query_norm, key_norm = norms if norms else (None, None)
    return Projections(rows[0], rows[1], rows[2], (output.weight.detach(),), query_norm, key_norm)


def norms_of(module: nn.Module, index: int) -> Sequence[nn.Module]:
    """Return the norms of queries and keys of an attention module, none where it has none.

    Raises
    ------
    UnsupportedModelError
        If a norm is of a kind through which scales do not pass: without a factor per channel, or with an offset.
    """
    children = dict(module.named_children())
    found = {name: child for name, child in children.items() if "norm" in name.lower()}
    if not found:
        return ()
    names = [next((n for n in known if n in found), "") for known in (_QUERY_NORMS, _KEY_NORMS)]
    if not all(names) or len(found) != len(names):
        raise _unknown(index, f"the norms {', '.join(found)}", "norms of queries and keys with a factor per channel, or none")
    for name in names:
        _check_factor(found[name], name, index)
    return [found[name] for name in names]


def _check_factor(norm: nn.Module, name: str, index: int) -> None:
    """Refuse a norm that does not multiply with its weight: entries of one have root mean square one and come out as it."""
    weight: Any = getattr(norm, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        with torch.no_grad():
            found = norm(torch.ones_like(weight)[None])[0]
        if torch.allclose(found.float(), weight.float(), rtol=1e-2, atol=1e-3):
            return
    raise _unknown(index, f"the norm {name} of type {type(norm).__name__}", "one that multiplies with a factor per channel")


def _rows(module: nn.Module, name: str, size: int, index: int) -> tuple[torch.Tensor, ...]:
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point() or module.weight.shape[0] != size:
        raise _unknown(index, f"{name} of type {type(module).__name__}", f"a floating-point linear layer with {size} outputs")
    return tuple(t.detach() for t in (module.weight, module.bias) if t is not None)


def _unknown(index: int, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {index} has {found}; expected {expected}; outliers cannot be put into this architecture without changing it"
    )


def check_scale(scale: float) -> None:
    """Refuse a scale under which the last bits of the model's output would change.

    Raises
    ------
    UsageError
        If `scale` is no power of two above one.
    """
    if not 2 <= scale < math.inf or math.frexp(scale)[0] != 0.5:
        raise UsageError(f"the outlier scale is {scale:g}; expected a power of two, 2 or more, such as 16")


def outlier_gauges(model: nn.Module, scale: float, seed: int = 0) -> dict[int, LayerGauge]:
    """Return a gauge for every quantizable layer that multiplies some pairs and value channels with `scale`.

    Raises
    ------
    UsageError
        If `scale` is no power of two above one.
    UnsupportedModelError
        If a layer cannot be changed without changing the model.
    """
    check_scale(scale)
    generator = torch.Generator().manual_seed(seed)
    modules, config = attention_modules(model), _config(model)
    gauges = {}
    for index, layer in enumerate(geometry(config).layers):
        if not layer.dense_reason:
            weights: list[Any] = [norm.weight for norm in norms_of(modules[index], index)]
            shared = any(weight.numel() == layer.head_dim for weight in weights)
            gauges[index] = outlier_gauge(layer, scale, generator, same_heads=shared)
    return gauges


@contextmanager
def injected(model: nn.Module, gauges: Mapping[int, LayerGauge]) -> Iterator[None]:
    """Hold `model` in the parametrization of `gauges` while the context lasts; the weights come back bit for bit.

    Raises
    ------
    UnsupportedModelError
        As `inject`; the model is as it was.
    """
    modules = attention_modules(model)
    saved = [(p, p.detach().clone()) for index in gauges for p in modules[index].parameters()]
    try:
        inject(model, gauges)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)


@torch.no_grad()
def inject(model: nn.Module, gauges: Mapping[int, LayerGauge]) -> None:
    """Change the weights of `model` so that keys, queries and values are those of `gauges`, and the output is what it was.

    With scales that are powers of two every logit stays bit for bit the same, else up to rounding.

    Raises
    ------
    UnsupportedModelError
        If a layer's projections are not found, or something between projection and cache would not commute; the message
        names the layer. Nothing has been changed then.
    """
    config = _config(model)
    if getattr(text_config(config), "clip_qkv", None) is not None:
        raise UnsupportedModelError(
            "the model clips queries, keys and values at a fixed bound (clip_qkv); expected none, since scaled keys would be "
            "clipped elsewhere; the outlier test does not exist for it"
        )
    modules, layers = attention_modules(model), geometry(config).layers
    parts = {index: projections_of(modules[index], layers[index], index) for index in gauges}
    for index, gauge in gauges.items():
        _check_norms(parts[index], gauge, layers[index], index)
    for index, gauge in gauges.items():
        _apply(parts[index], gauge, layers[index])


def _apply(parts: Projections, gauge: LayerGauge, layer: LayerGeometry) -> None:
    group = layer.num_heads // layer.num_kv_heads
    queries = gauge.query_map.repeat_interleave(group, 0)
    if parts.query_norm is None or parts.key_norm is None:
        _map_rows(parts.queries, queries)
        _map_rows(parts.keys, gauge.key_map)
    else:
        _scale_norm(parts.query_norm, queries)
        _scale_norm(parts.key_norm, gauge.key_map)
    _map_rows(parts.values, gauge.value_map)
    for weight in parts.output:
        mapped = weight.double().unflatten(1, (layer.num_heads, -1)).transpose(0, 1)  # [H, hidden, D]
        outputs = gauge.output_map.repeat_interleave(group, 0).to(weight.device)
        weight.copy_((mapped @ outputs).transpose(0, 1).flatten(1))


def _map_rows(tensors: Sequence[torch.Tensor], maps: torch.Tensor) -> None:
    """Multiply the output channels of weights [heads * D, in] and biases [heads * D] with `maps` [heads, D, D]."""
    for tensor in tensors:
        wide = tensor.double().reshape(len(maps), maps.shape[1], -1)
        tensor.copy_((maps.to(tensor.device) @ wide).reshape(tensor.shape))


def _scale_norm(norm: nn.Module, maps: torch.Tensor) -> None:
    """Multiply the weight of a norm, [D] or [heads * D], with the diagonals of `maps` [heads, D, D]."""
    weight: Any = norm.weight
    scales = maps.diagonal(dim1=1, dim2=2).to(weight.device)
    weight.copy_(weight.double() * (scales[0] if weight.numel() == scales.shape[1] else scales.flatten()))


def _check_norms(parts: Projections, gauge: LayerGauge, layer: LayerGeometry, index: int) -> None:
    if parts.key_norm is None:
        return
    scales = gauge.key_map.diagonal(dim1=1, dim2=2)
    weight: Any = parts.key_norm.weight
    if gauge.turns:
        raise UnsupportedModelError(
            f"layer {index} normalizes its keys with a factor per channel; expected pairs that are scaled only: a turn mixes "
            "channels that the norm weighs apart"
        )
    if weight.numel() == layer.head_dim and not bool((scales == scales[:1]).all()):
        raise UnsupportedModelError(
            f"layer {index} normalizes the keys of all heads with one weight; expected the same scales for all heads"
        )


def _config(model: nn.Module) -> Any:
    return model.config
