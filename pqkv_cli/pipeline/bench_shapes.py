"""Measures decode speed on the shapes of well-known models, with random weights and codebooks: no run is needed.

Attention of one layer over contexts and batches, whole decode steps beside other caches, and what encoding adds to a prefill.
What does not fit into memory is listed, not tried.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.decode_speed import OURS, TokenTimes, time_tokens
from pqkv_cli.evaluation.environment import environment
from pqkv_cli.evaluation.shapes import FORMATS, SHAPES, ModelShape, random_model, random_tables
from pqkv_cli.pipeline.reporter import Reporter
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.bench import AttentionTimes, copy_bandwidth, time_attention
from pqkv_kernels.dispatch import BackendRequest, choose_backend, encode_pages
from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS

SPEC = CacheSpec(4, 64)
GPU_CONTEXTS, GPU_BATCHES = (1024, 4096, 8192, 32768, 131072, 524288, 1048576), (1, 8, 64)
CPU_CONTEXTS, CPU_BATCHES = (1024, 4096), (1,)
_CPU_BYTES = 1 << 31  # what a measurement may take where the device does not say what is free
_NUM_CACHES = 4  # caches that lie side by side when whole steps are timed


@dataclass(frozen=True, slots=True)
class ShapeBench:
    """What was measured; `skipped` says what did not fit."""

    attention: tuple[dict[str, Any], ...]
    tokens: tuple[dict[str, Any], ...]
    encoding: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...]
    backend: str
    environment: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        missing = {"fp8": "torch's attention reads no fp8 cache, and transformers has none"}
        return {"schema": "pqkv.bench-shapes/1", "missing": missing, **asdict(self)}


def bench_shapes(
    names: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    backend: BackendRequest,
    reporter: Reporter,
    device: torch.device | str | None = None,
) -> ShapeBench:
    """Measure the shapes `names` of `SHAPES`; empty contexts or batches mean the usual ones of the device.

    `device` None or ``auto`` is the GPU where there is one.

    Raises
    ------
    RunError
        If the backend cannot run here, or gives wrong answers.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(usual if device in (None, "auto") else device)
    on_gpu = device.type == "cuda"
    contexts = contexts or (GPU_CONTEXTS if on_gpu else CPU_CONTEXTS)
    batches = batches or (GPU_BATCHES if on_gpu else CPU_BATCHES)
    run = _Bench(device, torch.bfloat16 if on_gpu else torch.float32, repeats, backend, [])
    attention: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    encoding: list[dict[str, Any]] = []
    try:
        with reporter.progress("shapes") as advance:
            for index, name in enumerate(names):
                attention += run.attention(name, contexts, batches)
                steps, prefill = run.steps(name, contexts)
                tokens += steps
                encoding += prefill
                advance(index + 1, len(names))
        chosen = attention[0]["backend"] if attention else choose_backend(backend, device).name
    except KernelError as error:
        raise RunError(str(error)) from error
    return ShapeBench(tuple(attention), tuple(tokens), tuple(encoding), tuple(run.skipped), chosen, environment(device))


@dataclass(frozen=True, slots=True)
class _Bench:
    device: torch.device
    dtype: torch.dtype
    repeats: int
    backend: BackendRequest
    skipped: list[str]

    def attention(self, name: str, contexts: Sequence[int], batches: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the times of one layer's attention for every format, batch and context that fits."""
        shape, bandwidth = SHAPES[name], copy_bandwidth(self.device)
        for label in FORMATS:
            keys, values = random_tables(shape, label, self.device)
            choice = choose_backend(self.backend, self.device, [(keys, values)])
            for batch in batches:
                for context in contexts:
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
                        repeats=self.repeats,
                        copy_gb_per_s=bandwidth,
                    )
                    yield {"shape": name, "format": label, **_attention_row(times)}

    def steps(self, name: str, contexts: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the times of whole decode steps, and of encoding beside a prefill, for every format."""
        shape, rows, encoding = SHAPES[name], [], []
        if not self._weights_fit(name, shape):
            return [], []
        model = random_model(shape, max(contexts) + self.repeats + 8, self.device, self.dtype)
        prefill_tokens = min(8192, max(min(contexts), PAGE_TOKENS))
        prefill_ms = self._prefill_ms(model, prefill_tokens)
        for label in FORMATS:
            keys, values = random_tables(shape, label, self.device)
            layer = {"keys": keys, "values": values}
            encoding.append(self._encoding(name, label, shape, prefill_tokens, prefill_ms))
            with Attached(model, [layer] * shape.num_layers, SPEC, backend=self.backend) as attached:  # type: ignore[list-item]
                for context in contexts:
                    if self._fits(f"{name}, whole steps, {context} tokens", shape, 1, context, _NUM_CACHES * shape.num_layers):
                        self._reset_peak()
                        times = time_tokens(attached, context, self.repeats)
                        rows.append({"shape": name, "format": label, **_token_row(times), "peak_bytes": self._peak()})
        return rows, encoding

    @torch.no_grad()
    def _prefill_ms(self, model: Any, num_tokens: int) -> float:
        ids = torch.ones(1, num_tokens, dtype=torch.int64, device=self.device)
        return min(self._elapsed_ms(lambda: model(ids, use_cache=True, logits_to_keep=1)) for _ in range(2))

    @torch.no_grad()
    def _encoding(self, name: str, label: str, shape: ModelShape, num_tokens: int, prefill_ms: float) -> dict[str, Any]:
        """Return what encoding the prefill's keys and values of all layers costs, and its share."""
        num_tokens -= num_tokens % PAGE_TOKENS
        keys, values = random_tables(shape, label, self.device)
        backend = choose_backend(self.backend, self.device, [(keys, values)]).name
        states = torch.randn(1, shape.num_kv_heads, num_tokens, shape.head_dim, device=self.device).to(self.dtype)
        angle = torch.arange(num_tokens, device=self.device)[None, :, None] * torch.logspace(
            0, -4, shape.head_dim // 2, device=self.device
        )
        angles = (angle.cos(), angle.sin())

        def encode() -> None:
            encode_pages(backend, states, keys, angles)
            encode_pages(backend, states, values)

        ms = min(self._elapsed_ms(encode) for _ in range(3)) * shape.num_layers
        return {
            "shape": name,
            "format": label,
            "tokens": num_tokens,
            "encode_ms": ms,
            "prefill_ms": prefill_ms,
            "share": ms / prefill_ms,
        }

    def _elapsed_ms(self, function: Any) -> float:
        self._wait()
        started = time.perf_counter()
        function()
        self._wait()
        return (time.perf_counter() - started) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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


def _attention_row(times: AttentionTimes) -> dict[str, Any]:
    return asdict(times) | {"ratio_to_static": times.ratio, "share_of_copy_bandwidth": times.bandwidth_share}


def _token_row(times: TokenTimes) -> dict[str, Any]:
    return asdict(times) | {"ratios": {name: times.ratio(name) for name in times.ms_per_token if name != OURS}}
