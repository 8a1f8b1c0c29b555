"""Adds exact tokens to attention over codes in C++: one call for what torch does in thirty operations. CPU tensors only.

The meaning is that of `pqkv_kernels.exact_tokens.add_exact`.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.attention import Part
from pqkv_kernels.exact_tokens import ExactTokens
from pqkv_kernels.native_build import found_library
from pqkv_kernels.native_threads import in_shares

SOURCE = Path(__file__).with_name("native_exact.cpp")
MOST_QUERIES = 16  # more are served better by matrix products
_DTYPES = (torch.float32, torch.bfloat16)
_THREAD_PRODUCTS = 1 << 19  # less work than so many products is not worth waking another thread


class _Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "token"))]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, _Tokens) for name in ("sink_keys", "sink_values", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("query", "starts", "stops", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "group", "num_queries", "dim", "num_sinks", "num_exact")),
        *((name, ctypes.c_int64) for name in ("first_slot", "halved")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    ]


def can_add(query: torch.Tensor, exact: ExactTokens) -> bool:
    """Return whether the loop serves `query` [B, H, Tq, D]: few, without gradient, on a CPU that can compile it.

    All are of one dtype, fp32 or bfloat16.
    """
    tensors = (query, *exact.sinks, *exact.recent)
    plain = all(t.dtype == query.dtype and t.stride(3) == 1 and not _is_traced(t) for t in tensors)
    few = query.shape[2] <= MOST_QUERIES and exact.newest is None
    served = query.dtype in _DTYPES and query.device.type == "cpu"
    return plain and few and served and found_library(SOURCE) is not None


def native_add_exact(coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
    """Return attention over all tokens as `add_exact` does, where `can_add`."""
    library = found_library(SOURCE)
    assert library is not None  # or `can_add` would refuse
    out, lse = (part.clone(memory_format=torch.contiguous_format) for part in coded)
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_exact = exact.recent[0].shape[1:3]
    held = {"query": query.float().contiguous(), "starts": exact.starts.contiguous(), "stops": exact.stops.contiguous()}
    numbers = {"num_queries": num_queries, "dim": dim, "num_sinks": exact.sinks[0].shape[2], "num_exact": num_exact}
    job = _Job(
        *(_Tokens(t.data_ptr(), *t.stride()[:3]) for t in (*exact.sinks, *exact.recent)),
        **{name: t.data_ptr() for name, t in (held | {"out": out, "lse": lse}).items()},
        **numbers,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        first_slot=exact.first_slot,
        halved=query.dtype == torch.bfloat16,
        scaling=scaling,
        softcap=softcap or 0.0,
    )
    in_shares(library.pqkv_exact, job, batch * kv_heads, max(1, query.numel() * num_exact // _THREAD_PRODUCTS))
    return out, lse


def _is_traced(t: torch.Tensor) -> bool:
    return t.requires_grad and torch.is_grad_enabled()
