"""The layers of transformers' own caches: which a model gets, which of them grow, how they are emptied, what they weigh."""

from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import CacheLayerMixin

__all__ = ["CacheLayerMixin", "forget", "grows", "own_layers", "tensor_bytes"]


def own_layers(config: Any) -> list[Any]:
    """Return the layers that transformers makes for a model of `config`, whatever they are called in its present version.

    Where the last layers of a model read earlier caches, older versions make none for them.
    """
    return list(DynamicCache(config=config).layers)


def grows(layer: Any) -> bool:
    """Return whether a layer holds keys and values of all tokens and nothing else, so that one of ours can stand in its place.

    Layers that hold more, a window or a state or an index, are classes below this one.
    """
    return type(layer) is DynamicLayer


def forget(layer: Any) -> None:
    """Drop the tokens of a layer before its ``reset``: older versions of transformers set them to zero and keep them."""
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


def tensor_bytes(layer: Any) -> int:
    """Return the bytes of all tensors that a layer holds: keys and values, or states."""
    return sum(t.numel() * t.element_size() for value in vars(layer).values() for t in _tensors(value))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for item in items for t in _tensors(item)]
