"""Vectors to code space in C++, in one pass over memory. CPU tensors only; the meaning is that of `codec.to_code_space`."""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.angles import Angles
from pqkv_kernels.channel_tables import channel_tables
from pqkv_kernels.native_build import found_library
from pqkv_kernels.native_threads import in_shares
from pqkv_kernels.tables import CodecTables

SOURCE = Path(__file__).with_name("native_points.cpp")
_THREAD_TOKENS = 512  # less work than this is not worth waking another thread


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "places", "factors", "cos", "sin", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "tokens", "dim", "pairs", "angle_stride")),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_h", "stride_t")),
    ]


def can_place(x: torch.Tensor, tables: CodecTables) -> bool:
    """Return whether the loop serves `x`: on a CPU that can compile it, without gradient, and no map of whole vectors."""
    dense = tables.map is not None and tables.map.ndim == 3
    traced = x.requires_grad and torch.is_grad_enabled()
    return x.device.type == "cpu" and not dense and not traced and _library() is not None


def native_points(x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, T, D] fp32 of `x`, where `can_place`; without `angles` they are not rotated."""
    library = _library()
    assert library is not None  # or `can_place` would refuse
    x = x.detach().float()
    if x.stride(3) != 1:
        x = x.contiguous()
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape)
    channels = channel_tables(tables)
    held = {"x": x, "places": channels.places, "factors": channels.factors, "out": out}
    numbers = dict(heads=heads, tokens=tokens, dim=dim, pairs=0, angle_stride=0)
    numbers |= dict(stride_b=x.stride(0), stride_h=x.stride(1), stride_t=x.stride(2))
    if angles is not None:
        held |= {name: t.float().contiguous() for name, t in zip(("cos", "sin"), angles, strict=True)}
        rows, _, pairs = held["cos"].shape
        numbers |= {"pairs": pairs, "angle_stride": tokens * pairs if rows > 1 else 0}
    job = _Job(**{name: t.data_ptr() for name, t in held.items()}, **numbers)
    count = batch * heads * tokens
    in_shares(library.pqkv_points, job, count, max(1, count // _THREAD_TOKENS))
    return out


def _library() -> ctypes.CDLL | None:
    return found_library(SOURCE)
