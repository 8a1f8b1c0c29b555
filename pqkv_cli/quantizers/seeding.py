"""k-means++ seeding of many subspaces at once (Arthur and Vassilvitskii, 2007). Knows points and weights only.

Once there are many seeds, several are drawn at a time, as in k-means|| (Bahmani et al., 2012): none of them changes much for
the others, and distances to all come from one matrix product.
"""

import torch

# Seeds drawn at a time: a share of those there are, up to a number.
ROUND_SHARE = 32
MOST_AT_ONCE = 4


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
    squares = planes.square().sum(dim=1)
    seeds = torch.empty(*planes.shape[:2], num_seeds, device=points.device)
    nearest, done = torch.ones_like(weights), 0
    while done < num_seeds:
        count = min(max(1, done // ROUND_SHARE), MOST_AT_ONCE, num_seeds - done)
        start = torch.rand(len(points), 1, generator=generator).to(points.device)
        chosen = _draw(weights * nearest, start, count)
        new = planes.gather(2, chosen[:, None].expand(-1, planes.shape[1], -1))  # [S, d, count]
        seeds[:, :, done : done + count] = new
        distance = _distances(planes, squares, new)
        nearest = distance if done == 0 else torch.minimum(nearest, distance)
        nearest.scatter_(1, chosen, 0.0)  # whatever rounding says
        done += count
    return seeds.transpose(1, 2).contiguous()


def _distances(planes: torch.Tensor, squares: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return the squared distances [S, N] of points `planes` [S, d, N] to the nearest of `seeds` [S, d, n], up to rounding."""
    lengths = seeds.square().sum(dim=1)[..., None]  # [S, n, 1]
    least = torch.baddbmm(lengths, seeds.transpose(1, 2), planes, alpha=-2).amin(dim=1)
    return least.add_(squares).clamp_(min=0)


def _draw(mass: torch.Tensor, start: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` indices [S, count] per row of `mass` [S, N], each with probability in proportion to it.

    They lie at equal steps of the cumulative mass, from a uniform `start` [S, 1] on: none comes twice unless it has more than a
    step of all mass.
    """
    cumulative = mass.cumsum(dim=1)
    steps = (start + torch.arange(count, device=mass.device)) / count  # [S, count]
    index = torch.searchsorted(cumulative, steps * cumulative[:, -1:], right=True)
    return index.clamp(max=mass.shape[1] - 1)
