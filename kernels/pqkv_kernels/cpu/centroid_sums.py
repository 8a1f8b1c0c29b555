"""What a step of k-means needs of every point and its centroid, in one pass over the points in C++. CPU tensors only."""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.cpu.build import in_shares, native_library

SOURCE = Path(__file__).parent / "src" / "centroids.cpp"


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("points", "weights", "centroids", "codes", "sums", "errors")),
        *((name, ctypes.c_int64) for name in ("num_points", "num_centroids", "dim")),
    ]


def native_centroid_sums(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `pqkv_kernels.reference.centroid_sums.centroid_sums` does, up to rounding.

    Raises
    ------
    KernelError
        If the loop cannot be compiled on this machine.
    """
    library = native_library(SOURCE)
    num_subspaces, num_centroids, dim = centroids.shape
    held = [tensor.contiguous() for tensor in (points, weights, centroids, codes)]
    sums = torch.zeros(num_subspaces, num_centroids, dim + 1, dtype=torch.float64)
    errors = torch.empty(points.shape[:2])
    places = [tensor.data_ptr() for tensor in (*held, sums, errors)]
    in_shares(library.pqkv_centroid_sums, _Job(*places, points.shape[1], num_centroids, dim), num_subspaces)
    return sums, errors
