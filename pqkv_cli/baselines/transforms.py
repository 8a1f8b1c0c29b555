"""Hadamard rotation, and the best grids for a Gaussian: what several baselines have in common."""

from functools import cache

import torch

from pqkv_cli.baselines.protocol import unsupported
from pqkv_cli.quantizers.kmeans import kmeans

SAMPLE_POINTS = 1 << 17
ITERATIONS = 60
_SEED = 0


@cache
def normal_codebook(dim: int, num_points: int) -> torch.Tensor:
    """Return `num_points` points [K, dim] fp32 of least mean squared error for a standard normal vector of `dim` channels."""
    return _fitted(_sample(dim), num_points)


@cache
def magnitude_codebook(dim: int, num_points: int) -> torch.Tensor:
    """Return points [K, dim] fp32 without signs for a standard normal vector whose signs are kept apart, one bit each.

    All coordinates are positive, so the nearest point for ``|x|`` with the signs of `x` is the nearest of all signed points.
    """
    return _fitted(_sample(dim).abs(), num_points)


def _sample(dim: int) -> torch.Tensor:
    return torch.randn(SAMPLE_POINTS, dim, generator=torch.Generator().manual_seed(_SEED))


def _fitted(points: torch.Tensor, num_points: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return kmeans(points[None], num_points, iterations=ITERATIONS, generator=generator).centroids[0]


def hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Walsh-Hadamard matrix [size, size] fp32 of a power of two; symmetric, its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    scaled: torch.Tensor = matrix / size**0.5
    return scaled


def turn(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `rows` [..., C] with every block of channels multiplied by `matrix` [block, block]."""
    turned: torch.Tensor = rows.unflatten(-1, (-1, len(matrix))) @ matrix.to(rows.device)
    return turned.flatten(-2)


def check_power_of_two(name: str, dim: int) -> None:
    """Let heads of `dim` channels pass if a Walsh-Hadamard transform of them exists.

    Raises
    ------
    UnsupportedModelError
        If `dim` is no power of two.
    """
    if dim & (dim - 1):
        raise unsupported(name, f"head_dim {dim}", "a power of two, for which the Walsh-Hadamard transform exists")
