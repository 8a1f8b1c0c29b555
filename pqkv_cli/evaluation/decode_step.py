"""One decode step over a cache filled at random: filling, running, weighing, the clock. Compares nothing."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.cache.drift import DriftWarning
from pqkv_cli.hf.cache_layers import tensor_bytes
from pqkv_cli.hf.names import cache_argument


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's tensors; quanto's packed tensors do not tell theirs."""
    return cache.num_bytes().total if isinstance(cache, QuantizedCache) else sum(map(tensor_bytes, cache.layers))


def filled(model: Any, cache: Any, context: int, batch: int = 1, chunk: int | None = None) -> Any:
    """Return `cache` with `context` random tokens in each of `batch` rows, put in `chunk` (by default all) at a time."""
    config = model.config.get_text_config()
    heads, dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, context, chunk or context):
        stop = min(start + (chunk or context), context)
        if isinstance(cache, QuantizedCache):
            cache.begin_step(torch.arange(start, stop, device=model.device).expand(batch, -1), None)
        for index in range(config.num_hidden_layers):
            shape = (2, batch, heads, stop - start, dim)
            states = torch.randn(shape, generator=generator, device=model.device, dtype=torch.float32).to(model.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)  # noise is unlike any text, and nobody reads what comes of it
                cache.update(states[0], states[1], index)
    return cache


def plain_step(model: Any, tokens: torch.Tensor, cache: Any, position: int) -> Any:
    """Decode `tokens` [B, 1], all at `position`, and return the model's answer."""
    where = torch.full_like(tokens, position)
    return model(input_ids=tokens, position_ids=where, **cache_argument(model, cache), use_cache=True)


def wall_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds until `run` is done and the device has nothing left to do."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - started) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
