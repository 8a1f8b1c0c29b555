"""Finding the attention modules of a loaded model and their output projections. Knows module trees; patches nothing."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from pqkv_cli.errors import UnsupportedModelError

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Return the self-attention module of every layer that has one, by layer index.

    Raises
    ------
    UnsupportedModelError
        If there is none, or two claim the same layer.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        kind = type(module).__name__
        if not isinstance(index, int) or "Attention" not in kind or "Cross" in kind:
            continue
        if index in found:
            raise UnsupportedModelError(
                f"layer {index} has two attention modules, {found[index][0]} and {name}; expected one. "
                "This architecture is not handled yet."
            )
        found[index] = (name, module)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention module that knows its layer; expected a decoder whose attention "
            "modules carry 'layer_idx', as transformers models do."
        )
    return {index: module for index, (_, module) in sorted(found.items())}


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """Return the names that the code of `module`'s class sees."""
    forward: Any = inspect.unwrap(type(module).forward)
    return dict(getattr(forward, "__globals__", {}))


def uses_interface(module: nn.Module) -> bool:
    """Return whether an attention module goes through the attention interface of transformers."""
    return "ALL_ATTENTION_FUNCTIONS" in forward_globals(module)


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and saved buffers below `module` by name, in order; offloaded ones are there while they are looked at.

    Packed weights are often buffers, so parameters alone would not tell two quantized models apart.
    """
    found = [
        (f"{prefix}.{name}" if prefix else name, owner, name)
        for prefix, owner in module.named_modules()
        for name in (*owner._parameters, *(set(owner._buffers) - owner._non_persistent_buffers_set))
    ]
    for full_name, owner, name in sorted(found, key=lambda entry: entry[0]):
        with align_module_device(owner):
            tensor = getattr(owner, name)
            if isinstance(tensor, torch.Tensor):
                yield full_name, tensor


def output_projection(attention: nn.Module) -> nn.Module:
    """Return the output projection of `attention`.

    Raises
    ------
    UnsupportedModelError
        If no child looks like one.
    """
    children = dict(attention.named_children())
    projection = next((children[name] for name in _OUTPUT_NAMES if name in children), None)
    if projection is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no output projection among {', '.join(children) or 'no children'}; "
            f"expected one named {', '.join(_OUTPUT_NAMES)}. This architecture is not handled yet."
        )
    return projection


def output_weight(attention: nn.Module, num_heads: int, head_dim: int) -> torch.Tensor:
    """Return the output projection of `attention` as [hidden, H * D] fp32, whatever stores it.

    Weights are read by pushing unit vectors through the module, so transposed and quantized linear layers need no case.

    Raises
    ------
    UnsupportedModelError
        As `output_projection`.
    """
    projection = output_projection(attention)
    weight = getattr(projection, "weight", None)
    if isinstance(projection, nn.Linear) and isinstance(weight, nn.Parameter) and _is_plain(weight.data):
        return weight.detach().float()
    dtype, device = _placement(projection)
    with torch.no_grad():
        units = torch.eye(num_heads * head_dim, dtype=dtype, device=device)
        probed: torch.Tensor = projection(units) - projection(torch.zeros_like(units[:1]))
        return probed.float().T


def _is_plain(weight: torch.Tensor) -> bool:
    # Subclasses of a tensor hold quantized weights; offloaded weights are not here.
    return type(weight) is torch.Tensor and weight.is_floating_point() and not weight.is_meta


def _placement(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device of what `module` computes with."""
    tensors = [*module.parameters(), *module.buffers()]
    floating = next((t for t in tensors if t.is_floating_point()), None)
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    return (floating.dtype if floating is not None else torch.float32), device
