"""Milliseconds per decoded token of one model over several caches, side by side in one process. Knows no tasks.

The caches are filled with random keys and values: speed does not depend on them, and no prefill of a long text is needed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
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

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        return asdict(self) | {"ratios": {name: self.ratio(name) for name in self.ms_per_token if name != OURS}}


@torch.no_grad()
def time_tokens(attached: Attached, context: int, repeats: int) -> TokenTimes:
    """Decode `repeats` tokens (after two to warm up) at `context` cached tokens, in turns over the caches."""
    model = attached.model
    makers, missing = _makers(attached, context + repeats + 2)
    caches = {name: filled(model, make(), context) for name, make in makers.items()}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    ours = model.config._attn_implementation
    try:
        for repeat in range(repeats + 2):
            for name, cache in caches.items():
                model.set_attn_implementation(ours if name == OURS else "sdpa")
                elapsed = step_ms(model, token, cache, context + repeat)
                if repeat >= 2:
                    times[name].append(elapsed)
    finally:
        model.set_attn_implementation(ours)
    held = {name: cache_bytes(cache) for name, cache in caches.items() if name != "QuantizedCache"}
    return TokenTimes(context, {name: quantiles(found) for name, found in times.items()}, missing, held)


def cache_bytes(cache: Any) -> int:
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
            cache.update(states[0], states[1], index)
    return cache


def step_ms(model: Any, tokens: torch.Tensor, cache: Any, position: int) -> float:
    """Return the milliseconds of a step over `tokens` [B, T], all at `position`, on the clock of the wall."""
    where = torch.full_like(tokens, position)
    return wall_ms(lambda: model(tokens, position_ids=where, past_key_values=cache, use_cache=True), tokens.device)


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
