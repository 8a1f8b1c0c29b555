"""Lays out the arguments of the C++ kernel, shares its work among threads and merges the parts. CPU tensors only.

The meaning is that of `pqkv_kernels.attention.code_attention`. Nothing decoded outlives a block of eight pages in a vector
register or first-level cache.
"""

import ctypes
from collections.abc import Sequence

import torch

from pqkv_kernels.addresses import page_addresses, whole_slabs
from pqkv_kernels.angles import Angles, PageAngles
from pqkv_kernels.attention import Part
from pqkv_kernels.layout import PAGE_TOKENS
from pqkv_kernels.native_build import native_library
from pqkv_kernels.native_tables import native_tables
from pqkv_kernels.native_threads import in_shares
from pqkv_kernels.plane_angles import step_factors
from pqkv_kernels.planes import Planes

MOST_QUERIES = 16  # per key/value head; more are served better by matrix products
_CHUNK_PAGES = 64
_MOST_BLOCK = 4  # queries that share what is looked up
_READ_BEYOND = 15  # numbers behind a row that may be loaded with it
_THREAD_PAGES = 64  # less work than this is not worth waking another thread


class _Side(ctypes.Structure):
    _fields_ = [
        ("groups", ctypes.c_void_p),
        ("num_groups", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
    ]


_POINTERS = ("query", "spans", "pair", "base_cos", "base_sin", "step_cos", "step_sin", "row_cos", "row_sin")
_SIZES = ("batch", "heads", "query_blocks", "block", "chunks", "chunk_pages", "num_pages", "planes", "num_pairs", "base_row")


class _Job(ctypes.Structure):
    _fields_ = [
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "out", "lse")),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("softcap", ctypes.c_float),
    ]


def can_attend(query: torch.Tensor, angles: Angles | PageAngles | None) -> bool:
    """Return whether the kernel serves `query` [B, Hkv, G, Tq, D]: few, without gradient, and keys turned page by page."""
    few = query.shape[2] * query.shape[3] <= MOST_QUERIES
    turned_by_page = angles is None or isinstance(angles, PageAngles)
    return few and turned_by_page and not (query.requires_grad and torch.is_grad_enabled())


def native_attention(
    query: torch.Tensor,
    key_pages: Sequence[torch.Tensor],
    value_pages: Sequence[torch.Tensor],
    keys: Planes,
    values: Planes,
    spans: torch.Tensor,
    scaling: float,
    angles: PageAngles | None = None,
    softcap: float | None = None,
) -> Part:
    """Attend as `pqkv_kernels.torch_attention.plane_attention` does, where `can_attend`; arguments are checked already."""
    batch, heads, group, num_queries, dim = query.shape
    rows = _blocks(query, keys, scaling)
    blocks, block = rows.shape[2:4]
    key_pages, value_pages = whole_slabs(key_pages), whole_slabs(value_pages)
    addresses = [page_addresses(slabs) for slabs in (key_pages, value_pages)]
    num_pages = addresses[0].shape[1]
    chunk_pages = _chunk_pages(num_pages, batch * heads * blocks)
    chunks = -(-num_pages // chunk_pages)
    out, lse = rows.new_empty(batch, heads, blocks, chunks, block, dim), rows.new_empty(batch, heads, blocks, chunks, block)
    library = native_library()
    tables = [native_tables(planes, library) for planes in (keys, values)]
    held = {"query": rows, "spans": spans.contiguous(), "out": out, "lse": lse}
    numbers = dict(batch=batch, heads=heads, query_blocks=blocks, block=block, chunks=chunks, chunk_pages=chunk_pages)
    numbers |= {"num_pages": num_pages, "planes": dim // 2, "num_pairs": 0, "base_row": 0}
    if angles is not None and keys.pairs is not None:
        held |= _turning(keys, angles)
        base = angles.base[0]
        numbers |= {"num_pairs": base.shape[2], "base_row": base.shape[1] if base.shape[0] > 1 else 0}
    sides = [
        _Side(t.groups.data_ptr(), len(t.groups), where.data_ptr(), slabs[0].shape[3])
        for t, where, slabs in zip(tables, addresses, (key_pages, value_pages), strict=True)
    ]
    job = _Job(*sides, softcap=softcap or 0.0, **{name: t.data_ptr() for name, t in held.items()}, **numbers)
    # Its loops know every block that `_blocks` makes.
    most = max(1, batch * heads * blocks * num_pages // _THREAD_PAGES)
    in_shares(library.pqkv_attend, job, batch * heads * blocks * chunks, most)
    if chunks > 1:
        in_shares(library.pqkv_merge, job, batch * heads * blocks, 1)
    return _unblocked(out, group, num_queries), _unblocked(lse, group, num_queries)


def _blocks(query: torch.Tensor, keys: Planes, scaling: float) -> torch.Tensor:
    """Return scaled queries [B, Hkv, Q, N, D] fp32 in the planes' order.

    Blocks are as few as serve them and as small as these can be, N of 1 to 4; zeros fill up the last.
    """
    batch, heads, group, num_queries, dim = query.shape
    channels = keys.channels[None, :, None].flatten(3).expand(batch, -1, group * num_queries, -1)
    rows = query.flatten(2, 3).gather(3, channels) * scaling
    count = rows.shape[2]
    block = -(-count // -(-count // _MOST_BLOCK))
    if missing := -count % block:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.reshape(batch, heads, -1, block, dim)


def _chunk_pages(num_pages: int, num_rows: int) -> int:
    """Return the pages of one part: all threads get work, and a part is no longer than its scores fit into a cache."""
    shares = max(1, torch.get_num_threads() // max(num_rows, 1))
    return max(1, min(_CHUNK_PAGES, -(-num_pages // shares)))


def _turning(keys: Planes, angles: PageAngles) -> dict[str, torch.Tensor]:
    assert keys.pairs is not None  # asked only of keys that are turned
    base_cos, base_sin = (t.contiguous() for t in angles.base)
    step = step_factors(angles, keys)
    if keys.steps.get("native.of", (None,))[0] is not step:
        keys.steps["native.step"] = step.real.contiguous(), step.imag.contiguous()
        cos, sin = torch.nn.functional.pad(torch.view_as_real(step.mT.flatten()).mT, (0, _READ_BEYOND))
        keys.steps["native.row"] = cos, sin
        keys.steps["native.of"] = (step, step)
    kept = dict(zip(("step_cos", "step_sin"), keys.steps["native.step"], strict=True))
    kept |= zip(("row_cos", "row_sin"), keys.steps["native.row"], strict=True)
    return {"pair": keys.pairs.contiguous(), "base_cos": base_cos, "base_sin": base_sin, **kept}


def _unblocked(blocks: torch.Tensor, group: int, num_queries: int) -> torch.Tensor:
    """Return [B, Hkv, G, Tq, ...] of the first parts of `blocks` [B, Hkv, Q, C, N, ...]."""
    first, count = blocks[:, :, :, 0], group * num_queries
    if first.shape[2] * first.shape[3] > count:
        first = first.flatten(2, 3)[:, :, :count]
    return first.reshape(*first.shape[:2], group, num_queries, *blocks.shape[5:])


assert PAGE_TOKENS == 64  # the C++ source says so, too
