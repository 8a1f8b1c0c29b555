"""What a step of k-means needs of every point and its centroid, for many subspaces at once. Knows nothing of codecs.

On a CPU with a compiler one pass over the points in C++; elsewhere torch. Both give the same up to rounding.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.cpu.build import found_library, in_shares

SOURCE = Path(__file__).parent / "src" / "centroids.cpp"
# From this many channels on, torch gathers vector by vector.
WIDE_CHANNELS = 16


def centroid_sums(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum of each centroid's points, their mass behind it, and the weighted error of every point.

    Parameters
    ----------
    points
        [S, N, d] fp32.
    weights
        [S, N] fp32.
    centroids
        [S, K, d] fp32.
    codes
        [S, N] int64, the centroid of every point.

    Returns
    -------
    tuple of torch.Tensor
        Sums [S, K, d + 1] fp64, the last channel holding the mass, and weighted squared distances [S, N] fp32.
    """
    if points.device.type == "cpu" and (library := found_library(SOURCE)) is not None:
        return _native(library, points, weights, centroids, codes)
    return torch_centroid_sums(points, weights, centroids, codes)


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("points", "weights", "centroids", "codes", "sums", "errors")),
        *((name, ctypes.c_int64) for name in ("num_points", "num_centroids", "dim")),
    ]


def _native(
    library: ctypes.CDLL, points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_subspaces, num_centroids, dim = centroids.shape
    held = [tensor.contiguous() for tensor in (points, weights, centroids, codes)]
    sums = torch.zeros(num_subspaces, num_centroids, dim + 1, dtype=torch.float64)
    errors = torch.empty(points.shape[:2])
    places = [tensor.data_ptr() for tensor in (*held, sums, errors)]
    in_shares(library.pqkv_centroid_sums, _Job(*places, points.shape[1], num_centroids, dim), num_subspaces)
    return sums, errors


def torch_centroid_sums(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `centroid_sums` does, on any device; it defines the meaning."""
    num_subspaces, num_centroids, num_channels = centroids.shape
    offset = torch.arange(num_subspaces, device=codes.device)[:, None] * num_centroids
    counted = torch.cat((points * weights[..., None], weights[..., None]), dim=-1).flatten(0, 1).double()
    sums = torch.zeros(num_subspaces * num_centroids, num_channels + 1, dtype=torch.float64, device=points.device)
    sums = sums.index_add_(0, (codes + offset).flatten(), counted).view(num_subspaces, num_centroids, -1)
    return sums, weights * _squared_distances(points, centroids, codes)


def _squared_distances(points: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    if points.shape[-1] >= WIDE_CHANNELS:
        return (points - centroids.gather(1, codes[..., None].expand(points.shape))).square().sum(dim=-1)
    total = torch.zeros_like(points[..., 0])
    for channel in range(points.shape[-1]):
        total += (points[..., channel] - centroids[..., channel].gather(1, codes)).square()
    return total
