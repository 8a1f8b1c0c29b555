"""Milliseconds per decoded token of one model over several caches, side by side in one process. Knows no tasks.

The caches are filled with random keys and values: speed does not depend on them, and no prefill of a long text is needed.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers import QuantizedCache as TransformersQuantizedCache

from pqkv_cli.evaluation.captured_steps import CAPTURED, OURS, ROOM, STATIC, Step, captured_steps
from pqkv_cli.evaluation.decode_step import cache_bytes, filled, plain_step, wall_ms
from pqkv_cli.hf.attention import attention_of
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.step_graph import Capture
from pqkv_kernels.bench import Quantiles, quantiles

_QUANTO = "optimum.quanto"
_RUN = 5  # steps of one cache, one after the other, that are counted


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Times of one decode step at `context` cached tokens and bytes held, by cache, and why a cache is missing."""

    context: int
    ms_per_token: Mapping[str, Quantiles]
    missing: Mapping[str, str]
    cache_bytes: Mapping[str, int] = field(default_factory=dict)

    def ratio(self, other: str) -> float | None:
        """Return how many times faster ours is than `other`; captured steps are compared with captured ones."""
        found = self.ms_per_token.get(other)
        ours = self.ms_per_token.get(OURS + CAPTURED if other.endswith(CAPTURED) else OURS)
        return None if found is None or ours is None else found.p50 / ours.p50

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        return asdict(self) | {"ratios": {name: self.ratio(name) for name in self.ms_per_token if name != OURS}}


@torch.no_grad()
def time_tokens(attached: Attached, context: int, repeats: int, capture: Capture | None = None) -> TokenTimes:
    """Decode at least `repeats` tokens at `context` cached tokens, a run of steps at a time in turns over the caches.

    Steps of a generation follow each other, too. The first of a run is not counted: it finds what another cache has left in the
    processor's. The first run warms up.

    On a GPU our cache and the static one are timed a second time with their steps replayed from a CUDA graph (`capture`).
    """
    model = attached.model
    counted = min(repeats, _RUN)
    runs = 1 + math.ceil(repeats / counted)
    makers, missing = _makers(attached, context + runs * (counted + 1) + ROOM)
    caches = {name: filled(model, make(), context) for name, make in makers.items()}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    steps: dict[str, Step] = {name: partial(plain_step, model, token, cache) for name, cache in caches.items()}
    ours = attention_of(model)
    with ExitStack() as stack:
        replayed, obstacles = captured_steps(attached, makers, token, context, capture, stack)
        steps, missing = steps | replayed, missing | obstacles
        stack.callback(model.set_attn_implementation, ours)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for run in range(runs):
            for name, step in steps.items():
                model.set_attn_implementation(ours if name.startswith(OURS) else "sdpa")
                first = context + run * (counted + 1)
                found = [wall_ms(partial(step, first + i), token.device) for i in range(counted + 1)]
                times[name] += found[1:] if run else []
    held = {name: cache_bytes(cache) for name, cache in caches.items() if name != "QuantizedCache"}
    return TokenTimes(context, {name: quantiles(found) for name, found in times.items()}, missing, held)


def _makers(attached: Attached, capacity: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    config = attached.model.config
    makers: dict[str, Callable[[], Any]] = {
        OURS: attached.new_cache,
        "DynamicCache": lambda: DynamicCache(config=config),
        STATIC: lambda: StaticCache(config=config, max_cache_len=capacity),
    }
    missing = {}
    if find_spec(_QUANTO.split(".")[0]) and find_spec(_QUANTO):
        makers["QuantizedCache"] = lambda: TransformersQuantizedCache("quanto", config, nbits=4)
    else:
        missing["QuantizedCache"] = "optimum-quanto is not installed"
    return makers, missing
