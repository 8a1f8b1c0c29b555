"""Measures decode speed on the shapes of well-known models, with random weights and codebooks: no run is needed.

Attention of one layer over contexts and batches, whole decode steps beside other caches, what codes add to reading a prompt,
and tokens per second of the largest batch that fits into the same memory.
What does not fit into memory is listed, not tried.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from transformers import StaticCache

from pqkv_cli.benchmarks.shapes import FORMATS, SHAPES, ModelShape, random_model, random_tables
from pqkv_cli.benchmarks.step_speed import (
    ROOM,
    Step,
    cache_bytes,
    captured_static,
    filled,
    plain_step,
    time_prefill,
    time_tokens,
    wall_ms,
)
from pqkv_cli.cache.schedule import most_exact, num_pages
from pqkv_cli.cache.storage import BLOCK_PAGES
from pqkv_cli.errors import CacheError, RunError
from pqkv_cli.evaluation.record import environment
from pqkv_cli.hf.attention import attending
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.cuda_graph import Capture, capture_cuda, choose_graph, step_graph
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.bench import Quantiles, copy_bandwidth, quantiles, time_attention
from pqkv_kernels.dispatch import BackendRequest, choose_backend
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.tables import CodecTables

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # kind, row

SPEC = CacheSpec(4, 64)
GPU_CONTEXTS, GPU_BATCHES = (1024, 4096, 8192, 32768, 131072, 524288, 1048576), (1, 8, 64)
CPU_CONTEXTS, CPU_BATCHES = (1024, 4096), (1,)
GPU_EQUAL, CPU_EQUAL = 32768, 1024  # tokens of each row where batches are compared in equal memory
MOST_PROMPT = 8192
_CPU_BUDGET = 1 << 26
_CPU_BYTES = 1 << 31  # what a measurement may take where the device does not say what is free
_NUM_CACHES = 6  # caches that lie side by side when whole steps are timed, those of captured steps included
WARM_UP = 2
_CHUNK_ROWS = 1 << 16  # tokens of all rows that are put in at a time: bounds what filling takes beside the cache
_LEAST_CHUNK = 8 * PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class ShapeSettings:
    """What to measure; empty contexts or batches mean the usual ones of the device.

    Attributes
    ----------
    names
        Shapes of `SHAPES`.
    device
        None or ``auto`` is the GPU where there is one.
    memory_bytes
        What caches may take where batches are compared in equal memory; None is half of what a GPU has free beside the
        weights, and 64 MiB on a CPU.
    """

    names: tuple[str, ...]
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    repeats: int = 20
    backend: BackendRequest = "auto"
    device: str | None = None
    memory_bytes: int | None = None


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


@dataclass(frozen=True, slots=True)
class ShapeBench:
    """What was measured; `skipped` says what did not fit."""

    attention: tuple[Row, ...]
    tokens: tuple[Row, ...]
    encoding: tuple[Row, ...]
    equal_memory: tuple[Row, ...]
    skipped: tuple[str, ...]
    backend: str
    environment: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        missing = {"fp8": "torch's attention reads no fp8 cache, and transformers has none"}
        return {"schema": "pqkv.bench-shapes/1", "missing": missing, **asdict(self)}


def bench_shapes(settings: ShapeSettings, reporter: Reporter) -> ShapeBench:
    """Measure; every backend passes its correctness gate before it is timed.

    Raises
    ------
    RunError
        If the backend cannot run here, or gives wrong answers.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(usual if settings.device in (None, "auto") else settings.device)
    on_gpu = device.type == "cuda"
    contexts = settings.contexts or (GPU_CONTEXTS if on_gpu else CPU_CONTEXTS)
    batches = settings.batches or (GPU_BATCHES if on_gpu else CPU_BATCHES)
    equal = settings.contexts or ((GPU_EQUAL,) if on_gpu else (CPU_EQUAL,))
    run = _Bench(device, torch.bfloat16 if on_gpu else torch.float32, settings, [])
    found: dict[str, list[Row]] = {kind: [] for kind in ("attention", "tokens", "encoding", "equal_memory")}
    try:
        with reporter.progress("shapes") as advance:
            for index, name in enumerate(settings.names):
                for kind, row in chain(run.attention(name, contexts, batches), run.model(name, contexts, equal)):
                    found[kind].append(row)
                advance(index + 1, len(settings.names))
        measured = found["attention"]
        chosen = measured[0]["backend"] if measured else choose_backend(settings.backend, device).name
    except KernelError as error:
        raise RunError(str(error)) from error
    rows = {kind: tuple(of_kind) for kind, of_kind in found.items()}
    return ShapeBench(**rows, skipped=tuple(run.skipped), backend=chosen, environment=environment(device))


@dataclass(frozen=True, slots=True)
class _Bench:
    device: torch.device
    dtype: torch.dtype
    settings: ShapeSettings
    skipped: list[str]

    def attention(self, name: str, contexts: Sequence[int], batches: Sequence[int]) -> Rows:
        """Yield the times of one layer's attention for every format, batch and context that fits."""
        shape, bandwidth = SHAPES[name], copy_bandwidth(self.device)
        for label, keys, values in self._formats(shape):
            choice = choose_backend(self.settings.backend, self.device, [(keys, values)])
            for batch, context in product(batches, contexts):
                if not self._fits(f"{name}, batch {batch}, {context} tokens", shape, batch, context, 2):
                    continue
                times = time_attention(
                    keys,
                    values,
                    group_size=shape.group_size,
                    batch=batch,
                    context=context,
                    backend=choice.name,
                    dtype=self.dtype,
                    repeats=self.settings.repeats,
                    copy_gb_per_s=bandwidth,
                )
                yield "attention", {"shape": name, "format": label, **times.row()}

    def model(self, name: str, contexts: Sequence[int], equal: Sequence[int]) -> Rows:
        """Yield the times of whole steps, of reading a prompt, and of batches in equal memory, for every format."""
        shape, repeats = SHAPES[name], self.settings.repeats
        if not self._weights_fit(name, shape):
            return
        model = random_model(shape, max(*contexts, *equal) + repeats + 8, self.device, self.dtype)
        budget = self.settings.memory_bytes or (self._free() // 2 if self.device.type == "cuda" else _CPU_BUDGET)
        static = [self._static(name, shape, model, context, budget) for context in equal]
        prompt = max((context for context in contexts if context <= MOST_PROMPT), default=MOST_PROMPT)
        for label, keys, values in self._formats(shape):
            named = {"shape": name, "format": label}
            layers: list[Any] = [{"keys": keys, "values": values}] * shape.num_layers
            with Attached(model, layers, SPEC, backend=self.settings.backend) as attached:
                yield "encoding", named | time_prefill(attached, keys, values, prompt, repeats).row()
                for context in contexts:
                    if self._fits(f"{name}, whole steps, {context} tokens", shape, 1, context, _NUM_CACHES * shape.num_layers):
                        self._reset_peak()
                        times = time_tokens(attached, context, repeats)
                        yield "tokens", named | times.row() | {"peak_bytes": self._peak()}
                for context, plain in zip(equal, static, strict=True):
                    row_bytes = codes_row_bytes(shape, keys, values, SPEC, self._last(context), self.dtype.itemsize)
                    batch = self._batch(f"{name}, {label}", context, budget, row_bytes)
                    if batch and plain is not None:
                        capture = capture_cuda if choose_graph("auto", attached, attached.new_cache()).used else None
                        coded = codes_throughput(attached, batch, context, repeats, capture)
                        yield "equal_memory", named | _compared(context, budget, plain, coded)

    def _formats(self, shape: ModelShape) -> Iterator[tuple[str, CodecTables, CodecTables]]:
        """Yield every format and its tables."""
        for label in FORMATS:
            yield label, *random_tables(shape, label, self.device)

    def _static(self, name: str, shape: ModelShape, model: Any, context: int, budget: int) -> Throughput | None:
        row_bytes = static_row_bytes(shape, self._last(context), self.dtype.itemsize)
        batch = self._batch(f"{name}, uncompressed", context, budget, row_bytes)
        capture = capture_cuda if self.device.type == "cuda" else None
        return static_throughput(model, batch, context, self.settings.repeats, capture) if batch else None

    def _batch(self, what: str, context: int, budget: int, row_bytes: int) -> int:
        """Return the largest batch whose cache fits; none is said."""
        if budget < row_bytes:
            self.skipped.append(
                f"{what}, equal memory: a row of {context} tokens needs {row_bytes / 1e9:.3g} GB of {budget / 1e9:.3g} GB"
            )
        return budget // row_bytes

    def _last(self, context: int) -> int:
        return context + self.settings.repeats + ROOM

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else _CPU_BYTES

    def _fits(self, what: str, shape: ModelShape, batch: int, context: int, copies: int) -> bool:
        needed, free = copies * shape.dense_bytes(batch, context, self.dtype.itemsize), self._free()
        if needed > 0.8 * free:
            self.skipped.append(f"{what}: needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB")
        return needed <= 0.8 * free

    def _weights_fit(self, name: str, shape: ModelShape) -> bool:
        projections = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
        count = shape.num_layers * (projections + 3 * shape.hidden_size * shape.intermediate_size)
        needed = (count + 2 * shape.vocab_size * shape.hidden_size) * self.dtype.itemsize
        if needed > 0.8 * self._free():
            self.skipped.append(f"{name}, whole steps: the weights need {needed / 1e9:.1f} GB of {self._free() / 1e9:.1f} GB")
        return needed <= 0.8 * self._free()


def _compared(context: int, budget: int, plain: Throughput, coded: Throughput) -> Row:
    ratio = coded.tokens_per_s / plain.tokens_per_s
    return {"context": context, "budget_bytes": budget, "static": plain.row(), "codes": coded.row(), "ratio": ratio}


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
