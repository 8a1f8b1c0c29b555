"""The angles of rotary embedding at any position, from the model's own module. Knows modules; rotates nothing."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.configs import text_config
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.models.geometry import geometry, layer_types
from pqkv_kernels.format.rotary import unit_angles

# From positions [B, T] int64 to (cos, sin), each [B, T, rotary_dim / 2] fp32 of unit modulus.
AngleSource = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rotary_angles(model: nn.Module, layer_index: int) -> AngleSource:
    """Return the function from positions [B, T] int64 to ``(cos, sin)`` [B, T, rotary_dim / 2] fp32 of unit modulus.

    The angles are the fp32 product that the model itself computes, before it casts them to its own dtype; they lie on the
    device of the positions.

    Raises
    ------
    UnsupportedModelError
        If the layer's keys cannot be coded before rotary embedding, or its rotary module is not found.
    """
    config: Any = model.config
    layout = geometry(config).layers[layer_index].rotary
    if layout is None:
        raise UnsupportedModelError(
            f"layer {layer_index} has no rotary embedding that can be undone; "
            "expected keys coded after it (key_space: post_rope)."
        )
    rotary = rotary_module(model, layer_index)
    kind = layer_types(text_config(config))[layer_index]
    extra = (kind,) if "layer_type" in inspect.signature(type(rotary).forward).parameters else ()
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))

    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probe = torch.zeros(1, dtype=torch.float32, device=device)  # Only its dtype and device are read.
        with torch.no_grad():
            cos, sin = rotary(probe, positions.to(device), *extra)
        cos, sin = unit_angles(cos, sin, layout)
        return cos.to(positions.device), sin.to(positions.device)

    return angles


def rotary_key(model: nn.Module, layer_index: int) -> tuple[int, str]:
    """Return what tells whether two layers have the same angles: their rotary module and their layer type."""
    config: Any = model.config
    return id(rotary_module(model, layer_index)), layer_types(text_config(config))[layer_index]


def rotary_module(model: nn.Module, layer_index: int) -> nn.Module:
    """Return the rotary module that serves a layer: the one nearest to its attention module in the tree.

    Raises
    ------
    UnsupportedModelError
        If the model has none.
    """
    attention = attention_modules(model)[layer_index]
    home = next(name for name, module in model.named_modules() if module is attention).split(".")
    candidates = {
        name: module
        for name, module in model.named_modules()
        if "Rotary" in type(module).__name__ and isinstance(module, nn.Module) and list(module.buffers())
    }
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no rotary module; expected one whose class name holds 'Rotary'. "
            "Code this model's keys after rotary embedding (key_space: post_rope)."
        )
    base = _own_base(model, layer_index)
    if base is not None:  # layers with bases of their own have one rotary module for each, and one that is not used
        candidates = {name: module for name, module in candidates.items() if _base(module) == base} or candidates
    return candidates[max(candidates, key=lambda name: _shared_prefix(name.split("."), home))]


def _own_base(model: nn.Module, layer_index: int) -> float | None:
    config: Any = model.config
    bases = getattr(text_config(config), "layer_rope_theta", None)
    return bases[layer_index] if bases else None


def _base(rotary: nn.Module) -> float | None:
    parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None)
    return parameters.get("rope_theta") if isinstance(parameters, dict) else None


def _shared_prefix(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
