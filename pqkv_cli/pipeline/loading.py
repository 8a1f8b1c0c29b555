"""Opens the model a recipe names, where and in the number format the recipe says."""

from typing import Any

import torch

from pqkv_cli.errors import UsageError
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.recipe import Recipe


def open_model(recipe: Recipe) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` of `recipe`.

    Raises
    ------
    UsageError
        If this machine has no such device.
    ModelError
        If the model is missing or unreadable.
    """
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return load_model(resolve_model(recipe.model), dtype, device_of(recipe))


def device_of(recipe: Recipe) -> str:
    """Return the device to use; ``auto`` is the GPU where there is one.

    Raises
    ------
    UsageError
        If this machine has no such device.
    """
    wanted = recipe.device
    found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if wanted == "auto":
        return "cuda" if found["cuda"] else "cpu"
    kind, _, index = wanted.partition(":")
    if int(index or 0) >= found[kind]:
        available = ", ".join(f"{name} ({count})" for name, count in found.items() if count)
        raise UsageError(f"--device is {wanted}, but this machine has {available}; choose one of these or auto")
    return wanted
