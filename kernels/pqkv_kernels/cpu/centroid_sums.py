"""What a step of k-means needs of every point and its centroid, in one pass over the points in C++. CPU tensors only."""

from pathlib import Path

import torch

from pqkv_kernels.cpu.build import in_shares, native_library
from pqkv_kernels.cpu.structs import structure

SOURCE = Path(__file__).parent / "src" / "centroids.cpp"
_Job = structure(SOURCE, "CentroidJob")


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
    sums = torch.zeros(num_subspaces, num_centroids, dim + 1, dtype=torch.float64)
    errors = torch.empty(points.shape[:2])
    given = {"points": points, "weights": weights, "centroids": centroids, "codes": codes}
    held = {name: tensor.contiguous() for name, tensor in given.items()} | {"sums": sums, "errors": errors}
    pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
    job = _Job(**pointers, num_points=points.shape[1], num_centroids=num_centroids, dim=dim)
    in_shares(library.pqkv_centroid_sums, job, num_subspaces)
    return sums, errors
