"""k-means++ seeding of many subspaces at once (Arthur and Vassilvitskii, 2007). Knows points and weights only."""

from collections.abc import Callable

import torch

# From this many channels on, distances to a seed come from a matrix product.
WIDE_CHANNELS = 16


def choose_seeds(points: torch.Tensor, weights: torch.Tensor, num_seeds: int, generator: torch.Generator) -> torch.Tensor:
    """Return `num_seeds` of the points of each subspace, drawn by weight times squared distance to the seeds before.

    Parameters
    ----------
    points
        [S, N, d] fp32.
    weights
        [S, N] fp32, not negative.
    num_seeds
        Seeds per subspace; once every distinct point is a seed, further ones repeat a point.
    generator
        A CPU generator.

    Returns
    -------
    torch.Tensor
        [S, num_seeds, d] fp32.
    """
    planes = points.transpose(1, 2).contiguous()  # [S, d, N]: distances vectorize along the points
    distances = _narrow_distances(planes) if planes.shape[1] < WIDE_CHANNELS else _wide_distances(planes)
    draws = torch.rand(num_seeds, len(points), 1, generator=generator).to(points.device)
    seeds = torch.empty(len(points), points.shape[2], num_seeds, device=points.device)
    nearest = torch.ones_like(weights)
    for i in range(num_seeds):
        chosen = _draw(weights * nearest, draws[i])
        seed = planes.gather(2, chosen[:, None].expand(-1, planes.shape[1], -1))  # [S, d, 1]
        seeds[:, :, i] = seed[:, :, 0]
        distance = distances(seed)
        nearest = distance if i == 0 else torch.minimum(nearest, distance)
        nearest.scatter_(1, chosen, 0.0)  # whatever rounding says
    return seeds.transpose(1, 2).contiguous()


def _narrow_distances(planes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what gives the squared distances [S, N] of the points `planes` [S, d, N] to a seed [S, d, 1]."""
    difference = torch.empty_like(planes)

    def distances(seed: torch.Tensor) -> torch.Tensor:
        torch.sub(planes, seed, out=difference)
        return difference.square_().sum(dim=1) if planes.shape[1] > 1 else difference.square_()[:, 0].clone()

    return distances


def _wide_distances(planes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same by one matrix product, up to fp32 rounding: several times faster where there are many channels."""
    squares = planes.square().sum(dim=1)

    def distances(seed: torch.Tensor) -> torch.Tensor:
        products = torch.bmm(seed.transpose(1, 2), planes)[:, 0]
        return (squares + seed.square().sum(dim=1) - 2 * products).clamp(min=0)

    return distances


def _draw(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return one index [S, 1] per row of `mass` [S, N], with probability in proportion to it, from uniform `draws` [S, 1]."""
    cumulative = mass.cumsum(dim=1)
    index = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return index.clamp(max=mass.shape[1] - 1)
