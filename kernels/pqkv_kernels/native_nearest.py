"""Shares the search for nearest centroids among threads of the C++ loops. CPU tensors only; knows nothing of codecs.

Eight times as fast as a matrix product and an argmax, because points of few channels make products that only wait for memory.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.native_build import found_library
from pqkv_kernels.native_threads import in_shares
from pqkv_kernels.score_lines import score_lines

SOURCE = Path(__file__).with_name("native_nearest.cpp")
DIMS = (1, 2, 4, 8)  # channels of a point that the loop knows; more are served better by a matrix product
MOST_FEW = 4  # of the nearest, which the loop keeps in registers


def can_search(points: torch.Tensor) -> bool:
    """Return whether the loop serves `points` [S, N, d]: on a CPU, of few channels, and the machine can compile it."""
    return points.device.type == "cpu" and points.shape[2] in DIMS and _library() is not None


def native_nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return what `pqkv_kernels.nearest.nearest_centroids` does, where `can_search`; shapes are checked already."""
    library = _library()
    assert library is not None  # or `can_search` would refuse
    num_subspaces, num_points, dim = points.shape
    points, lines = points.detach().float().contiguous(), score_lines(centroids.detach().float())
    codes = torch.empty(num_subspaces, num_points, dtype=torch.int64)
    sizes = [ctypes.c_int64(n) for n in (num_points, centroids.shape[1], dim)]
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (points, lines, codes)]

    failed = in_shares(lambda begin, end: library.pqkv_nearest(*addresses, *sizes, begin, end), num_subspaces)
    assert not any(failed)  # the loop knows all of `DIMS`
    return codes


def can_sort(points: torch.Tensor, count: int) -> bool:
    """Return whether `native_few` serves scores of `points`: on a CPU, not too many, and the machine can compile it."""
    return points.device.type == "cpu" and count <= MOST_FEW and _library() is not None


def native_few(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the [R, count, n] indices of the largest of contiguous `scores` [R, K, n] fp32 along K, from the largest.

    Of equal ones the smaller index comes first.
    """
    library = _library()
    assert library is not None  # or `can_sort` would refuse
    rows, num_centroids, columns = scores.shape
    few = torch.empty(rows, count, columns, dtype=torch.int64)
    sizes = [ctypes.c_int64(n) for n in (rows, num_centroids, columns, count)]
    failed = library.pqkv_few(ctypes.c_void_p(scores.data_ptr()), ctypes.c_void_p(few.data_ptr()), *sizes)
    assert not failed  # the loop knows every count up to `MOST_FEW`
    return few


def _library() -> ctypes.CDLL | None:
    return found_library(SOURCE)
