"""Chooses between the few nearest prototypes of vectors by what their parts leave over, in C++. CPU tensors only.

The meaning is that of `pqkv_kernels.quantize.quantize`, which chooses when this runs.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.layout import CodeGroup
from pqkv_kernels.native_build import found_library
from pqkv_kernels.native_threads import in_shares
from pqkv_kernels.score_lines import score_lines

SOURCE = Path(__file__).with_name("native_parts.cpp")
DIMS = (1, 2, 4, 8, 16)  # channels of a part that the loop knows


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "prototypes", "few", "parts", "cells", "codes")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "tokens", "dim", "num_prototypes", "tried", "num_parts")),
    ]


def can_choose(x: torch.Tensor, stage: tuple[CodeGroup, ...]) -> bool:
    """Return whether the loop serves vectors `x` with parts of `stage`: on a CPU that can compile it, for channels it knows."""
    return x.device.type == "cpu" and all(group.subspace_dim in DIMS for group in stage) and _library() is not None


def best_prototypes(
    x: torch.Tensor, few: torch.Tensor, table: torch.Tensor, stage: tuple[CodeGroup, ...], parts: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Return codes as `quantize` does, where `can_choose`.

    Parameters
    ----------
    x
        Code-space vectors [B, Hkv, T, D] fp32.
    few
        Numbers of the prototypes to try, [B, Hkv, n, T] int64, the nearest first.
    table
        Prototypes, [Hkv, C, D] fp32.
    stage, parts
        The groups of the second stage and their codebooks [Hkv, M, ksub, dsub].
    """
    library = _library()
    assert library is not None  # or `can_choose` would refuse
    batch, heads, tokens, dim = x.shape
    x, few, table = x.detach().contiguous(), few.contiguous(), table.detach().contiguous()
    rows, held = _part_rows(stage, parts)
    codes = torch.empty(batch, heads, 1 + len(rows), tokens, dtype=torch.int64)
    tensors = {"x": x, "prototypes": table, "few": few, "parts": rows, "codes": codes}
    numbers = dict(rows=batch * heads, heads=heads, tokens=tokens, dim=dim)
    numbers |= dict(num_prototypes=table.shape[1], tried=few.shape[2], num_parts=len(rows))
    library.pqkv_new_cells.restype = ctypes.c_void_p
    cells = ctypes.c_void_p(library.pqkv_new_cells(ctypes.c_int64(heads * len(rows))))
    try:
        job = _Job(**{name: t.data_ptr() for name, t in tensors.items()}, cells=cells, **numbers)
        in_shares(library.pqkv_cells, job, heads * len(rows))
        in_shares(library.pqkv_parts, job, batch * heads * -(-tokens // library.pqkv_block()))
    finally:
        library.pqkv_delete_cells(cells)
    assert held  # lived until here
    return list(codes.split([1, *(group.num_subspaces for group in stage)], dim=2))


def _part_rows(stage: tuple[CodeGroup, ...], tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a row of `Part` of the C++ source for every part, [M, 5] int64, and what their addresses point into."""
    rows, held, channel = [], [], 0
    for group, table in zip(stage, tables, strict=True):
        lines = score_lines(table.detach().float())
        held.append(lines)
        for m in range(group.num_subspaces):
            address = lines.data_ptr() + m * lines.stride(1) * lines.element_size()
            rows.append([group.subspace_dim, group.num_centroids, channel, address, lines.stride(0)])
            channel += group.subspace_dim
    return torch.tensor(rows, dtype=torch.int64), held


def _library() -> ctypes.CDLL | None:
    return found_library(SOURCE)
