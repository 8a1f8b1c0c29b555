"""The attention interface of transformers: registering a function and its mask, and choosing one for a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def register(name: str, function: Callable[..., Any]) -> None:
    """Make `function` known to transformers as the attention `name`, with `causal_mask`; harmless when repeated."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, causal_mask)


def causal_mask(*, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of sdpa; None only where one query sees all keys, or as many queries as keys are causal.

    sdpa also leaves it out for the first tokens of a longer, static cache. But Gemma 4 drops queries after its mask is made, so
    that fewer queries than keys without a mask must mean the last ones.
    """
    skip = kwargs.pop("allow_is_causal_skip", True) and q_length in (1, kv_length)
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)
    return mask


def attention_of(model: Any) -> str:
    """Return the name of the attention that `model` uses."""
    return str(model.config._attn_implementation)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Let `model` use the attention `name` while the context lasts."""
    before = attention_of(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
