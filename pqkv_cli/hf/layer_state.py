"""What a cache layer of transformers holds, taken apart into tensors and plain facts, and put together again.

Layers keep what they hold in attributes: keys and values, or states by number, and how many tokens there were. All of them are
taken as they are, so that a layer put together goes on as the other would. What is none of these is refused.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from pqkv_cli.errors import CacheError
from pqkv_cli.hf.cache_layers import grows

Facts = dict[str, Any]
_EMPTY = "DummyLayer"  # stands where a layer reads an earlier one's cache; older versions have none there


def one_row(layer: Any, row: int, num_rows: int) -> Any:
    """Return a layer that holds row `row` of `layer`, whose batch has `num_rows`; where that is all, the same tensors."""
    twin = copy.copy(layer)
    if num_rows == 1:
        return twin
    for name, value in vars(twin).items():
        if isinstance(value, dict):  # states by number, which the other layer must keep
            setattr(twin, name, dict(value))
    twin.reorder_cache(torch.tensor([row]))
    return twin


def taken_apart(layer: Any) -> tuple[dict[str, torch.Tensor], Facts]:
    """Return the tensors of `layer` by name, and everything else as what JSON can hold.

    Raises
    ------
    CacheError
        If it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, {name: _fact(value, name, tensors) for name, value in vars(layer).items()}


def put_together(layer: Any, tensors: Mapping[str, torch.Tensor], facts: Facts, device: torch.device) -> None:
    """Let `layer`, a new one of the same class, hold `tensors` on `device` and `facts`, as `taken_apart` gave them."""
    for name, fact in facts.items():
        setattr(layer, name, _value(fact, tensors, device))


def can_crop(layer: Any) -> bool:
    """Return whether the last tokens of a layer that is not ours can be taken off, and leave it as it was before them."""
    if type(layer).__name__ == _EMPTY or grows(layer):
        return True
    # A sliding window that is not full yet has lost nothing.
    return bool(getattr(layer, "is_sliding", False)) and layer.get_seq_length() < layer.sliding_window


def _fact(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": ""}  # wherever the layer lies then
    if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
        return {"dict": [[key, _fact(each, f"{path}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_fact(each, f"{path}.{i}", tensors) for i, each in enumerate(value)]}
    raise CacheError(
        f"a cache layer of this model holds a {type(value).__name__} ({path}); expected tensors and numbers, which can be "
        "stored: keep this model's caches in memory"
    )


def _value(fact: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    if not isinstance(fact, dict):
        return fact
    ((kind, held),) = fact.items()
    match kind:
        case "tensor":
            return tensors[held].to(device)
        case "dtype":
            return getattr(torch, held)
        case "device":
            return device
        case "dict":
            return {key: _value(each, tensors, device) for key, each in held}
        case _:
            items = [_value(each, tensors, device) for each in held]
            return items if kind == "list" else tuple(items)
