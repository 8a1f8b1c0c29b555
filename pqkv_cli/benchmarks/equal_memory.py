"""Tokens per second in the same memory: the largest batch whose cache fits, uncompressed and as codes.

The largest batch follows from computed footprints; it is then filled, weighed and timed. Knows no command line.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from pqkv_cli.benchmarks.shapes import ModelShape
from pqkv_cli.benchmarks.step_speed import ROOM, Step, cache_bytes, captured_static, filled, plain_step, wall_ms
from pqkv_cli.cache.schedule import most_exact, num_pages
from pqkv_cli.cache.storage import BLOCK_PAGES
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.attention import attending
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.cuda_graph import Capture, step_graph
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.bench import Quantiles, quantiles
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.tables import CodecTables

WARM_UP = 2
_CHUNK_ROWS = 1 << 16  # tokens of all rows that are put in at a time: bounds what filling takes beside the cache
_LEAST_CHUNK = 8 * PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Throughput:
    """Decode steps of one cache at a batch, `captured` in a graph or not; `cache_bytes` are weighed after the last step."""

    batch: int
    cache_bytes: int
    ms_per_step: Quantiles
    captured: bool

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second."""
        return self.batch / self.ms_per_step.p50 * 1e3

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


def static_row_bytes(shape: ModelShape, num_tokens: int, itemsize: int) -> int:
    """Return what one row of `num_tokens` takes in a static uncompressed cache."""
    return shape.num_layers * shape.dense_bytes(1, num_tokens, itemsize)


def codes_row_bytes(
    shape: ModelShape, keys: CodecTables, values: CodecTables, spec: CacheSpec, num_tokens: int, itemsize: int
) -> int:
    """Return what one row of `num_tokens` takes at most in a quantized cache: codes, exact tokens, positions and page angles.

    At most, because a window may stand anywhere between two flushes, and the last block of pages need not be full.
    """
    pages = num_pages(num_tokens, spec.window_tokens)
    page_bytes = shape.num_kv_heads * (keys.layout.page_bytes + values.layout.page_bytes)
    exact = 2 * shape.num_kv_heads * shape.head_dim * itemsize * (spec.num_sinks + most_exact(spec.window_tokens))
    pairs = 0 if keys.rotary is None else keys.rotary.num_pairs
    positions = 2 * 8 + 4 * num_tokens + pages * (4 + 2 * 4 * pairs)
    addresses = 2 * 8 * pages
    return shape.num_layers * ((pages + BLOCK_PAGES) * page_bytes + exact + addresses) + positions


@torch.no_grad()
def static_throughput(model: Any, batch: int, context: int, repeats: int, capture: Capture | None) -> Throughput:
    """Time `batch` rows over transformers' StaticCache with torch's own attention; captured, if `capture` can."""
    with attending(model, "sdpa"):
        cache = StaticCache(config=model.config, max_cache_len=context + repeats + ROOM)
        tokens = _fill(model, cache, batch, context)
        step: Step = partial(plain_step, model, tokens, cache)
        if capture is not None:
            try:
                step = captured_static(model, cache, tokens, context, capture)
            except CacheError:
                capture = None  # the record says so
        times = _times(step, tokens.device, context, repeats)
    return Throughput(batch, cache_bytes(cache), times, capture is not None)


@torch.no_grad()
def codes_throughput(attached: Attached, batch: int, context: int, repeats: int, capture: Capture | None) -> Throughput:
    """Time `batch` rows over codes; captured by `capture` where it is given.

    Raises
    ------
    CacheError
        If the step cannot be captured.
    """
    model, cache = attached.model, attached.new_cache()
    tokens = _fill(model, cache, batch, context)
    step = partial(plain_step, model, tokens, cache)
    with nullcontext() if capture is None else step_graph(attached, cache, capture):
        times = _times(step, tokens.device, context, repeats)
    return Throughput(batch, cache_bytes(cache), times, capture is not None)


def _fill(model: Any, cache: Any, batch: int, context: int) -> torch.Tensor:
    """Fill `cache` and return the tokens [B, 1] of a step."""
    filled(model, cache, context, batch, max(_LEAST_CHUNK, _CHUNK_ROWS // batch // PAGE_TOKENS * PAGE_TOKENS))
    return torch.ones(batch, 1, dtype=torch.int64, device=model.device)


def _times(step: Step, device: torch.device, context: int, repeats: int) -> Quantiles:
    times = [wall_ms(partial(step, context + number), device) for number in range(repeats + WARM_UP)]
    return quantiles(times[WARM_UP:])
