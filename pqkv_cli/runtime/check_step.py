"""Does the model use its cache as it must? One token goes through it before any text does.

What shows here and not in a config: a class whose forward passes by the module that the step hook sits on, a keyword that
attention does not understand, keys or values of another shape than the artifact's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.errors import PqkvError, UnsupportedModelError
from pqkv_cli.hf.names import cache_argument


@torch.no_grad()
def check_step(model: Any, cache: QuantizedCache) -> None:
    """Let `model` read one token into `cache`, which is new; one on the device ``meta``, which computes nothing, is left out.

    Raises
    ------
    UnsupportedModelError
        If the step fails, or the cache was not told of it, or a quantized layer was not given its keys and values.
    """
    device = torch.device(model.device)
    if device.type == "meta":
        return
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    name = type(model).__name__
    try:
        with _evaluating(model):
            model(input_ids=token, **cache_argument(model, cache), use_cache=True)
    except (PqkvError, torch.OutOfMemoryError) as error:
        if cache.timeline.num_slots or not isinstance(error, PqkvError):
            raise
        raise UnsupportedModelError(_unannounced(name)) from error
    except Exception as error:  # a model's own code can raise anything, and all of it means that the model cannot be used
        raise UnsupportedModelError(
            f"{name} cannot take a step of one token over a quantized cache: {type(error).__name__}: {error}; "
            "expected a causal language model that reads input_ids alone. Use this model without pqkv"
        ) from error
    if not cache.timeline.num_slots:
        raise UnsupportedModelError(_unannounced(name))
    if empty := [i for i, layer in enumerate(cache.layers) if layer in cache.quantized_layers and layer.get_seq_length() != 1]:
        raise UnsupportedModelError(
            f"{name} gave no keys and values to its cache in layers {', '.join(map(str, empty))}; expected those of every "
            "quantized layer at every step. Use this model without pqkv"
        )


def _unannounced(name: str) -> str:
    return (
        f"{name} passes by its own base model when it is called, so that no step's positions are known; expected a model "
        "whose forward calls model.base_model, as most of transformers do. Use this model without pqkv"
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Let no part of `model` draw random numbers while the context lasts: what the caller draws next stays the same."""
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
