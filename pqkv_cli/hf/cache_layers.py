"""The layers of transformers' own caches: which a model gets, which of them grow, how they are emptied, what they weigh.

Also the quantizers inside the layers of its ``QuantizedCache``, which are private there.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import DynamicCache, DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.cache_utils import CacheLayerMixin

__all__ = ["CacheLayerMixin", "LayerQuantizer", "forget", "grows", "own_layers", "tensor_bytes", "uncompressed_cache"]


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


_ROOM = 256  # tokens for which there is room behind those held; more are copied at once when it is full


def uncompressed_cache(config: Any) -> DynamicCache:
    """Return the cache that `generate` makes for a model of `config`, whose full-attention layers append in place."""
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceLayer() if grows(layer) else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache


class InPlaceLayer(DynamicLayer):
    """A DynamicLayer with room behind its keys and values, [B, Hkv, T, D] views of which are what it holds and returns."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `key_states` and `value_states`, each [B, Hkv, T, D], and return all keys and values."""
        if not self.get_seq_length():
            held: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return held
        assert self.keys is not None and self.values is not None  # there are tokens
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        room = self._room_for(self.keys, self.values, end)
        for tensor, new in zip(room, (key_states, value_states), strict=True):
            tensor[..., begin:end, :] = new
        self.keys, self.values = (tensor[..., :end, :] for tensor in room)
        return self.keys, self.values

    def _room_for(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tensors that begin with `keys` and `values` and reach to `end`, new ones if need be."""
        held = (keys, values)
        if self._room is not None and self._room[0].shape[-2] >= end and _begins_with(self._room, held):
            return self._room
        self._room = (_grown(keys, end + _ROOM), _grown(values, end + _ROOM))
        return self._room


def _begins_with(room: tuple[torch.Tensor, ...], held: tuple[torch.Tensor, ...]) -> bool:
    return all(a.data_ptr() == b.data_ptr() and len(a) == len(b) for a, b in zip(room, held, strict=True))


def _grown(tensor: torch.Tensor, length: int) -> torch.Tensor:
    grown = tensor.new_empty(*tensor.shape[:-2], length, tensor.shape[-1])
    grown[..., : tensor.shape[-2], :] = tensor
    return grown


Backend = Literal["quanto", "hqq"]
_LAYERS: Mapping[Backend, Any] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}


class LayerQuantizer:
    """The quantizer of one backend of ``QuantizedCache``, alone.

    Raises
    ------
    ImportError
        If the backend's package is not installed.
    """

    def __init__(self, backend: Backend, nbits: int, group_size: int) -> None:
        self._backend, self._layer = backend, _LAYERS[backend](nbits=nbits, q_group_size=group_size)

    def quantize(self, x: torch.Tensor) -> Any:
        """Return what the backend makes of `x` [B, Hkv, T, D], in a form that only it understands."""
        self._layer.keys = x[..., :0, :]  # it looks for its dtype there
        return self._layer._quantize(x, axis=0)

    def dequantize(self, held: Any) -> torch.Tensor:
        """Return the vectors that `held` stands for."""
        decoded: torch.Tensor = self._layer._dequantize(held)
        return decoded

    def tensors(self, held: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the packed codes, and scales and zero points, of what `quantize` made."""
        if self._backend == "quanto":
            return held._data._data, (held._scale, held._shift)
        packed, meta = held
        return packed, (meta["scale"], meta["zero"])
