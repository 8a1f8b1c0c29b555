"""Searches the nearest centroids in C++, shared among threads. CPU tensors only; knows nothing of codecs.

Several times as fast as a matrix product and an argmax: scores never leave the registers.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.native_build import found_library
from pqkv_kernels.native_threads import in_shares
from pqkv_kernels.score_lines import score_lines

SOURCE = Path(__file__).with_name("native_nearest.cpp")
SHORT_DIMS = (1, 2, 4, 8)  # channels of a point that stay in registers, too
MOST_FEW = 4  # of the nearest, which the loop keeps in registers


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("points", "lines", "codes")),
        *((name, ctypes.c_int64) for name in ("num_points", "num_centroids", "dim", "few")),
    ]


def can_search(points: torch.Tensor, count: int = 1) -> bool:
    """Return whether `native_few` serves `points`: on a CPU, not too many of the nearest, and the machine can compile it."""
    return points.device.type == "cpu" and count <= MOST_FEW and _library() is not None


def native_few(points: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` nearest of `centroids` [S, K, d] to `points` [S, N, d], where `can_search`; shapes are checked.

    Returns
    -------
    torch.Tensor
        [S, count, N] int64, nearest first, and of equally near ones the smaller index.
    """
    library = _library()
    assert library is not None  # or `can_search` would refuse
    num_subspaces, num_points, dim = points.shape
    points, lines = points.detach().float().contiguous(), score_lines(centroids.detach().float())
    codes = torch.empty(num_subspaces, count, num_points, dtype=torch.int64)
    job = _Job(points.data_ptr(), lines.data_ptr(), codes.data_ptr(), num_points, centroids.shape[1], dim, count)
    if count == 1 and dim in SHORT_DIMS:
        in_shares(library.pqkv_nearest, job, num_subspaces)
    else:
        in_shares(library.pqkv_few, job, num_subspaces * -(-num_points // library.pqkv_block()))
    return codes


def _library() -> ctypes.CDLL | None:
    return found_library(SOURCE)
