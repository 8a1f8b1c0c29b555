"""Milliseconds per decoded token of one model over several caches, side by side in one process. Knows no tasks.

The caches are filled with random keys and values: speed does not depend on them, and no prefill of a long text is needed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache as TransformersQuantizedCache

from pqkv_cli.cache.cache import QuantizedCache, tensor_bytes
from pqkv_cli.runtime.attach import Attached
from pqkv_kernels.bench import Quantiles, quantiles

OURS = "pqkv"
_QUANTO = "optimum.quanto"


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Times of one decode step at `context` cached tokens and bytes held, by cache, and why a cache is missing."""

    context: int
    ms_per_token: Mapping[str, Quantiles]
    missing: Mapping[str, str]
    cache_bytes: Mapping[str, int] = field(default_factory=dict)

    def ratio(self, other: str) -> float | None:
        """Return how many times faster ours is than `other`."""
        found = self.ms_per_token.get(other)
        return None if found is None else found.p50 / self.ms_per_token[OURS].p50


@torch.no_grad()
def time_tokens(attached: Attached, context: int, repeats: int) -> TokenTimes:
    """Decode `repeats` tokens (after two to warm up) at `context` cached tokens, in turns over the caches."""
    model = attached.model
    makers, missing = _makers(attached, context + repeats + 2)
    caches = {name: _filled(model, make(), context) for name, make in makers.items()}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    ours = model.config._attn_implementation
    try:
        for repeat in range(repeats + 2):
            for name, cache in caches.items():
                model.set_attn_implementation(ours if name == OURS else "sdpa")
                elapsed = _step_ms(model, token, cache, context + repeat)
                if repeat >= 2:
                    times[name].append(elapsed)
    finally:
        model.set_attn_implementation(ours)
    held = {name: _cache_bytes(cache) for name, cache in caches.items() if name != "QuantizedCache"}
    return TokenTimes(context, {name: quantiles(found) for name, found in times.items()}, missing, held)


def _cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's tensors; quanto's packed tensors do not tell theirs."""
    return cache.num_bytes().total if isinstance(cache, QuantizedCache) else sum(map(tensor_bytes, cache.layers))


def _makers(attached: Attached, capacity: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    config = attached.model.config
    makers: dict[str, Callable[[], Any]] = {
        OURS: attached.new_cache,
        "DynamicCache": lambda: DynamicCache(config=config),
        "StaticCache": lambda: StaticCache(config=config, max_cache_len=capacity),
    }
    missing = {}
    if find_spec(_QUANTO.split(".")[0]) and find_spec(_QUANTO):
        makers["QuantizedCache"] = lambda: TransformersQuantizedCache("quanto", config, nbits=4)
    else:
        missing["QuantizedCache"] = "optimum-quanto is not installed"
    return makers, missing


def _filled(model: Any, cache: Any, context: int) -> Any:
    config = model.config.get_text_config()
    heads, dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    generator = torch.Generator(model.device).manual_seed(0)
    if isinstance(cache, QuantizedCache):
        cache.begin_step(torch.arange(context, device=model.device)[None], None)
    for index in range(config.num_hidden_layers):
        shape = (2, 1, heads, context, dim)
        states = torch.randn(shape, generator=generator, device=model.device, dtype=torch.float32).to(model.dtype)
        cache.update(states[0], states[1], index)
    return cache


def _step_ms(model: Any, token: torch.Tensor, cache: Any, position: int) -> float:
    where = torch.full_like(token, position)
    if token.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(token, position_ids=where, past_key_values=cache, use_cache=True)
    if token.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3
