"""Puts outliers into a model without changing what it computes, and takes them out again. Knows projections and norms.

Real models have channels many times larger than others. A quantizer whose quality depends on them depends on an accident of
the parametrization: the same function has parametrizations without. This makes the accident on purpose.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pqkv_cli.errors import UnsupportedModelError, UsageError
from pqkv_cli.hf.configs import text_config
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.models.gauge import LayerGauge, outlier_gauge
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.projections import Projections, norms_of, projections_of
from pqkv_cli.specs import LayerGeometry


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
