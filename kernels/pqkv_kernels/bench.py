"""Times attention over codes against attention over a static dense cache, in one process. Knows no models.

A time is taken only after the same tables have passed the correctness gate on the same device and backend.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from pqkv_kernels.dispatch import BackendName, attend_codes
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens
from pqkv_kernels.reference.attention import code_attention, code_queries, leave_code_space

GATE_TOKENS = 5 * PAGE_TOKENS
GATE_ERROR = 0.01  # relative root mean square: tables in half precision and tf32 products are well below
_FLUSH_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Times in milliseconds."""

    p10: float
    p20: float
    p50: float
    p80: float
    p90: float


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """One shape: decode attention of one layer for one new token.

    `codes_ms` is ours, `static_ms` torch's attention over a dense static cache of `dense_type`; `code_bytes` and `dense_bytes`
    are what each must read at least once; `copy_gb_per_s` is the bandwidth measured by copying.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    backend: str
    dense_type: str
    gate_error: float
    codes_ms: Quantiles
    static_ms: Quantiles
    code_bytes: int
    dense_bytes: int
    copy_gb_per_s: float

    @property
    def ratio(self) -> float:
        """How many times faster than the dense cache."""
        return self.static_ms.p50 / self.codes_ms.p50

    @property
    def codes_gb_per_s(self) -> float:
        """Gigabytes of codes read per second."""
        return self.code_bytes / (self.codes_ms.p50 * 1e6)

    @property
    def static_gb_per_s(self) -> float:
        """Gigabytes of the dense cache read per second."""
        return self.dense_bytes / (self.static_ms.p50 * 1e6)

    @property
    def bandwidth_share(self) -> float:
        """Share of the copy bandwidth at which codes are read."""
        return self.codes_gb_per_s / self.copy_gb_per_s

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        return asdict(self) | {
            "ratio_to_static": self.ratio,
            "codes_gb_per_s": self.codes_gb_per_s,
            "static_gb_per_s": self.static_gb_per_s,
            "share_of_copy_bandwidth": self.bandwidth_share,
            "static_share_of_copy_bandwidth": self.static_gb_per_s / self.copy_gb_per_s,
        }


def gate(keys: CodecTables, values: CodecTables, group_size: int, backend: BackendName, dtype: torch.dtype) -> float:
    """Return the error of `backend` against the reference, relative to the answer's root mean square.

    Raises
    ------
    KernelError
        If it exceeds `GATE_ERROR`: such a backend is not timed.
    """
    query, tokens = gate_inputs(keys, values, group_size, dtype)
    scaling = keys.layout.head_dim**-0.5
    found, _ = attend_codes(backend, query, tokens, scaling)
    expected, _ = code_attention(code_queries(query, keys), tokens, scaling)
    dense = leave_code_space(expected, values)
    error = relative_error(found, dense)
    if not error <= GATE_ERROR:  # a comparison with NaN is false
        raise KernelError(
            f"the {backend} backend differs from the reference by {error:.3g} of the answer; expected at most {GATE_ERROR}: "
            "nothing is timed. Choose another backend and report this"
        )
    return error


def time_attention(
    keys: CodecTables,
    values: CodecTables,
    *,
    group_size: int,
    batch: int,
    context: int,
    backend: BackendName,
    dtype: torch.dtype,
    repeats: int,
    copy_gb_per_s: float,
) -> AttentionTimes:
    """Time one shape on the device of the tables; `context` is rounded down to whole pages.

    Raises
    ------
    KernelError
        If the gate is not passed.
    """
    error = gate(keys, values, group_size, backend, dtype)
    heads, dim, num_tokens = keys.num_heads, keys.layout.head_dim, max(context // PAGE_TOKENS, 1) * PAGE_TOKENS
    query, tokens = bench_inputs(keys, values, group_size, batch, num_tokens, dtype)
    dense = torch.randn(2, batch, heads, num_tokens, dim, device=query.device, dtype=dtype)

    def codes() -> None:
        attend_codes(backend, query, tokens, dim**-0.5)

    def static() -> None:
        functional.scaled_dot_product_attention(query, dense[0], dense[1], enable_gqa=True)

    codes_ms, static_ms = measure((codes, static), repeats, query.device)
    return AttentionTimes(
        batch=batch,
        num_heads=heads * group_size,
        num_kv_heads=heads,
        head_dim=dim,
        context=num_tokens,
        backend=backend,
        dense_type=str(dtype).removeprefix("torch."),
        gate_error=error,
        codes_ms=codes_ms,
        static_ms=static_ms,
        code_bytes=sum(pages.numel() for pages in (*tokens.key_pages, *tokens.value_pages)),
        dense_bytes=dense.numel() * dense.element_size(),
        copy_gb_per_s=copy_gb_per_s,
    )


def measure(functions: tuple[Callable[[], None], ...], repeats: int, device: torch.device) -> list[Quantiles]:
    """Return the times of `functions`, taken in turns so that a busy moment meets all of them."""
    # On a GPU codes must come from memory, as they do in a model: the caches are overwritten in between.
    flush = torch.empty(_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):  # the first two warm up
        for function, taken in zip(functions, times, strict=True):
            flush.zero_()
            elapsed = _elapsed_ms(function, device)
            if repeat >= 2:
                taken.append(elapsed)
    return [quantiles(taken) for taken in times]


def quantiles(times_ms: list[float]) -> Quantiles:
    """Return the quantiles of at least one time."""
    if len(times_ms) == 1:
        return Quantiles(*times_ms * 5)
    cuts = statistics.quantiles(times_ms, n=10, method="inclusive")
    return Quantiles(cuts[0], cuts[1], cuts[4], cuts[7], cuts[8])


def copy_bandwidth(device: torch.device) -> float:
    """Return the gigabytes read and written per second by copying."""
    source = torch.zeros(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.numel() / (measure((copy,), 5, device)[0].p50 * 1e6)


def _elapsed_ms(function: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def relative_error(answer: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `expected`."""
    return float((answer - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def gate_inputs(
    keys: CodecTables, values: CodecTables, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, CodedTokens]:
    """Return `bench_inputs` of the correctness gate: a few pages, of which neither the first slots nor the last ones count."""
    query, tokens = bench_inputs(keys, values, group_size, 1, GATE_TOKENS, dtype)
    return query, replace(tokens, spans=torch.tensor([[3, GATE_TOKENS - 5]], device=query.device))


def bench_inputs(
    keys: CodecTables, values: CodecTables, group_size: int, batch: int, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, CodedTokens]:
    """Return random queries of one new token and random codes of consecutive positions, on the device of the tables."""
    device = keys.codebooks[0][0].device
    heads, num_pages = keys.num_heads, num_tokens // PAGE_TOKENS
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(batch, heads * group_size, 1, keys.layout.head_dim, generator=generator, device=device).to(dtype)
    pages = [
        torch.randint(
            0, 256, (batch, num_pages, heads, t.layout.page_bytes), dtype=torch.uint8, generator=generator, device=device
        )
        for t in (keys, values)
    ]
    spans = torch.tensor([[0, num_tokens]] * batch, device=device)
    tokens = CodedTokens([pages[0]], [pages[1]], keys, values, spans)
    if keys.rotary is None:
        return query, tokens
    rate = torch.logspace(0, -4, keys.rotary.num_pairs, device=device)
    base = (torch.arange(num_pages, device=device)[:, None] * PAGE_TOKENS * rate).expand(batch, -1, -1)
    step = torch.arange(PAGE_TOKENS, device=device)[:, None] * rate
    return query, replace(tokens, angles=PageAngles((base.cos(), base.sin()), (step.cos(), step.sin())))
