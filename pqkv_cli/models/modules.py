"""Finding the attention modules of a loaded model and their output projections. Knows module trees; patches nothing."""

import inspect
from typing import Any

import torch
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


def output_weight(attention: nn.Module, num_heads: int, head_dim: int) -> torch.Tensor:
    """Return the output projection of `attention` as [hidden, H * D] fp32, whatever stores it.

    Weights are read by pushing unit vectors through the module, so transposed and quantized linear layers need no case.

    Raises
    ------
    UnsupportedModelError
        If no child looks like an output projection.
    """
    children = dict(attention.named_children())
    projection = next((children[name] for name in _OUTPUT_NAMES if name in children), None)
    if projection is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no output projection among {', '.join(children) or 'no children'}; "
            f"expected one named {', '.join(_OUTPUT_NAMES)}. This architecture is not handled yet."
        )
    weight = getattr(projection, "weight", None)
    if isinstance(projection, nn.Linear) and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.detach().float()
    dtype, device = _placement(projection)
    with torch.no_grad():
        units = torch.eye(num_heads * head_dim, dtype=dtype, device=device)
        probed: torch.Tensor = projection(units) - projection(torch.zeros_like(units[:1]))
        return probed.float().T


def _placement(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    floating = next((p for p in parameters if p.is_floating_point()), None)
    return (floating.dtype if floating is not None else torch.float32), parameters[0].device
