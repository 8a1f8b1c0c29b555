"""Opens the model a recipe names, where and in the number format the recipe says."""

from typing import Any

import torch

from pqkv_cli.errors import UsageError
from pqkv_cli.models.load import load_config, load_model, settled
from pqkv_cli.models.precision import Precision, automatic_precision, is_quantized, stored_format
from pqkv_cli.models.resolve import ResolvedModel, resolve_model
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter


def open_model(recipe: Recipe, reporter: Reporter) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` of `recipe`.

    `reporter` is told which number format was chosen, where one was, and that a GGUF file is converted, where it is.

    Raises
    ------
    UsageError
        If this machine has no such device.
    ModelError
        If the model is missing or unreadable.
    """
    device = device_of(recipe)
    resolved = settled(resolve_model(recipe.model), reporter.note)
    if recipe.dtype == "auto" and torch.device(device).type == "cpu":
        return _opened_on_cpu(resolved, device, reporter)
    return load_model(resolved, None if recipe.dtype == "auto" else getattr(torch, recipe.dtype), device)


def _opened_on_cpu(resolved: ResolvedModel, device: str, reporter: Reporter) -> tuple[Any, Any]:
    config = load_config(resolved)
    # Quantized weights and the numbers beside them fit one another as they are stored.
    stored = None if is_quantized(config) else stored_format(config)
    chosen = _told(automatic_precision(stored, device), reporter)
    model, tokenizer = load_model(resolved, chosen.dtype, device)
    if stored is None and not is_quantized(config):  # only the weights themselves say it
        model = model.to(_told(automatic_precision(model.dtype, device), reporter).dtype)
    return model, tokenizer


def _told(chosen: Precision, reporter: Reporter) -> Precision:
    if chosen.reason is not None:
        reporter.note(chosen.reason)
    return chosen


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
