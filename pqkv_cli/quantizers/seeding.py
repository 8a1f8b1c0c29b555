"""k-means++ seeding of many subspaces at once (Arthur and Vassilvitskii, 2007). Knows points and weights only."""

import torch


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
    draws = torch.rand(num_seeds, len(points), 1, generator=generator).to(points.device)
    seeds = torch.empty(len(points), points.shape[2], num_seeds, device=points.device)
    nearest = torch.ones_like(weights)
    difference = torch.empty_like(planes)
    for i in range(num_seeds):
        chosen = _draw(weights * nearest, draws[i])
        seed = planes.gather(2, chosen[:, None].expand(-1, planes.shape[1], -1))  # [S, d, 1]
        seeds[:, :, i] = seed[:, :, 0]
        torch.sub(planes, seed, out=difference)
        distance = difference.square_().sum(dim=1) if planes.shape[1] > 1 else difference.square_()[:, 0]
        nearest = distance if i == 0 else torch.minimum(nearest, distance)
    return seeds.transpose(1, 2).contiguous()


def _draw(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return one index [S, 1] per row of `mass` [S, N], with probability in proportion to it, from uniform `draws` [S, 1]."""
    cumulative = mass.cumsum(dim=1)
    index = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return index.clamp(max=mass.shape[1] - 1)
