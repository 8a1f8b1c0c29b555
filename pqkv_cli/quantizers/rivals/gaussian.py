"""Vector codebooks for standard normal variables. Knows no method; the same numbers come out in every process.

Several methods first make every vector look normal and then need one codebook, for all models and texts. It is found by
k-means on a seeded normal sample (Pages and Printems 2003 do the same by stochastic steps); no file of a grid is needed.
"""

from functools import cache

import torch

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
