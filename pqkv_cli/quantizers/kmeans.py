"""k-means of many subspaces at once, seeded by k-means++ (Arthur and Vassilvitskii, 2007). Knows points and weights only.

Once there are many seeds, several are drawn at a time, as in k-means|| (Bahmani et al., 2012): none of them changes much for
the others, and distances to all come from one matrix product.
"""

from dataclasses import dataclass

import torch

from pqkv_cli.errors import DataError
from pqkv_kernels.dispatch import centroid_sums, nearest_centroids

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


# An iteration that improves the distortion by less than this share is a subspace's last one.
TOLERANCE = 1e-4
# How far centroids go towards the mean of their points. Below 2 no step makes the distortion larger, as for fixed codes it is
# ``constant + mass * ||centroid - mean||^2``; 1 would be Lloyd's, and leaves 1 to 2 % more after 12 or 25 iterations.
RELAXATION = 1.8
SAMPLE_SHARE = 4
SAMPLE_POINTS = 4096
SAMPLE_POINTS_PER_CENTROID = 8
# Coordinates fitted at a time; an iteration holds some 30 bytes of each.
CHUNK_COORDINATES = 1 << 25


@dataclass(frozen=True, slots=True)
class KMeansResult:
    """Centroids of every subspace.

    Attributes
    ----------
    centroids
        [S, K, d] fp32.
    distortion
        Weighted mean squared distance of the points to their centroid, [S] fp32.
    """

    centroids: torch.Tensor
    distortion: torch.Tensor


def kmeans(
    points: torch.Tensor,
    num_centroids: int,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 25,
    generator: torch.Generator,
) -> KMeansResult:
    """Fit `num_centroids` centroids to the points of each of `S` independent subspaces.

    The same points, weights and generator state give the same bits on one machine. Where there are fewer distinct points than
    centroids, each distinct point gets a centroid and the others are duplicates.

    Parameters
    ----------
    points
        [S, N, d], any float dtype; computed in fp32.
    num_centroids
        Centroids per subspace, K.
    weights
        [S, N], not negative, or None for equal weights.
    iterations
        Largest number of Lloyd steps.
    generator
        A CPU generator; the only source of randomness.

    Raises
    ------
    DataError
        If there are fewer points than centroids, or a point or weight is not finite, or a weight is negative.
    """
    _check(points, num_centroids, weights)
    rows = max(1, CHUNK_COORDINATES // max(1, points[0].numel()))
    weight_parts = [None] * -(-len(points) // rows) if weights is None else weights.split(rows)
    results = [
        _fitted(part, num_centroids, part_weights, iterations, generator)
        for part, part_weights in zip(points.split(rows), weight_parts, strict=True)
    ]
    return KMeansResult(torch.cat([r.centroids for r in results]), torch.cat([r.distortion for r in results]))


def _fitted(
    points: torch.Tensor, num_centroids: int, weights: torch.Tensor | None, iterations: int, generator: torch.Generator
) -> KMeansResult:
    points = points.float()
    center = points.mean(dim=1, keepdim=True)  # small coordinates keep the fp32 scores of nearest_centroids sharp
    points = points - center
    weights = points.new_ones(points.shape[:2]) if weights is None else _positive(weights.float())
    sample, sample_weights = _sample(points, weights, num_centroids, generator)
    centroids = choose_seeds(sample, sample_weights, num_centroids, generator)
    remaining = iterations
    if sample is not points:
        centroids, _ = _lloyd(sample, sample_weights, centroids, iterations // 2)
        remaining -= iterations // 2
    centroids, distortion = _lloyd(points, weights, centroids, remaining)
    return KMeansResult(centroids + center, distortion)


def _check(points: torch.Tensor, num_centroids: int, weights: torch.Tensor | None) -> None:
    num_points = points.shape[1]
    if num_points < num_centroids:
        raise DataError(
            f"found {num_points} vectors for {num_centroids} centroids; expected at least one vector per centroid; "
            "calibrate on more text or choose fewer bits per code"
        )
    finite = torch.isfinite(points).flatten(1).all(dim=1)
    if weights is not None:
        finite = finite & (torch.isfinite(weights) & (weights >= 0)).all(dim=1)
    if not bool(finite.all()):
        bad = int(torch.nonzero(~finite)[0])
        raise DataError(
            f"found NaN, infinite or negatively weighted vectors in subspace {bad} of {len(finite)}; expected finite vectors "
            "with weights >= 0; check the model's activations in this dtype and calibrate again"
        )


def _positive(weights: torch.Tensor) -> torch.Tensor:
    """Return weights of mean one; rows without any weight count their points equally."""
    mean = weights.mean(dim=1, keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(weights))


def _sample(
    points: torch.Tensor, weights: torch.Tensor, num_centroids: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a share of the points [S, n, d] and their weights [S, n]; the arguments themselves where there are few.

    A quarter of the sample is the points that pull hardest, by weight and distance from the mean, so that a few dominating
    tokens or outliers are never missed; the others are drawn uniformly and weigh in for those left out.
    """
    num_points = points.shape[1]
    size = max(SAMPLE_POINTS, SAMPLE_POINTS_PER_CENTROID * num_centroids, num_points // SAMPLE_SHARE)
    if size >= num_points:
        return points, weights
    num_heavy = size // 4
    priority = torch.rand(num_points, generator=generator).to(points.device).expand(weights.shape).contiguous()
    distance = points.square().sum(dim=2)  # from the mean of all points
    pull = weights * (distance.mean(dim=1, keepdim=True) + distance)
    heavy = pull.topk(num_heavy, dim=1).indices
    priority.scatter_(1, heavy, 2.0)
    index = priority.topk(size, dim=1).indices.sort(dim=1).values
    factor = torch.where(priority.gather(1, index) > 1, 1.0, (num_points - num_heavy) / (size - num_heavy))
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1])), weights.gather(1, index) * factor


def _lloyd(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centroids after up to `iterations` steps and their distortion; subspaces that have converged drop out."""
    final, distortion = centroids.clone(), points.new_zeros(len(points))
    active = torch.arange(len(points), device=points.device)
    previous = torch.full_like(distortion, torch.inf)
    for step in range(iterations + 1):
        codes = nearest_centroids(points, centroids)
        sums, errors = centroid_sums(points, weights, centroids, codes)
        current = errors.mean(dim=1, dtype=torch.float64).div(weights.mean(dim=1, dtype=torch.float64)).float()
        final[active], distortion[active] = centroids, current
        updated, settled = _update(points, centroids, sums, errors)
        # A subspace with centroids to spare and errors left is not done: its idle centroids have just been moved.
        going = (previous - current > TOLERANCE * current) | ~(settled | (current == 0))
        if step == iterations or not bool(going.any()):
            break
        if not bool(going.all()):
            points, weights, updated, active = points[going], weights[going], updated[going], active[going]
        centroids, previous = updated, current[going]
    return final, distortion


def _update(
    points: torch.Tensor, centroids: torch.Tensor, sums: torch.Tensor, errors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next centroids [S, K, d], past the weighted means of their points, and which subspaces [S] had no idle one.

    An idle centroid (no weight) moves to the point with the largest weighted error, a second one to the next, and so on.
    """
    mass = sums[..., -1]
    idle = mass <= 0
    means = (sums[..., :-1] / mass.clamp(min=torch.finfo(torch.float64).tiny)[..., None]).float()
    updated = centroids + RELAXATION * (means - centroids)
    settled = ~idle.any(dim=1)
    if not bool(settled.all()):
        rank = idle.cumsum(dim=1) - 1
        worst = errors.topk(int(idle.sum(dim=1).max()), dim=1).indices
        seeds = worst.gather(1, rank.clamp(min=0, max=worst.shape[1] - 1))
        moved = points.gather(1, seeds[..., None].expand(-1, -1, points.shape[-1]))
        updated = torch.where(idle[..., None], moved, updated)
    return updated, settled
