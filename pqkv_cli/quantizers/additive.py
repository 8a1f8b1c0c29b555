"""Tables whose sums code the same points (additive quantization, Babenko and Lempitsky 2014). Knows points and weights only.

An algorithm of its own beside k-means, though `quantizers.product` alone calls it: that file knows layouts, this one does not.

Small tables read faster than one large one of as many sums, and bend less to the points. They are fitted together: points go to
their nearest sum, then all tables at once to the least squared error for those codes, again and again.
"""

import math
from collections.abc import Sequence

import torch

from pqkv_cli.quantizers.kmeans import CHUNK_COORDINATES, kmeans
from pqkv_kernels.dispatch import nearest_centroids
from pqkv_kernels.reference.merged_stages import all_sums

# Share of a subspace's weight that holds every table entry where it was: tables of sums may trade a constant with each other.
RIDGE = 1e-6
TOLERANCE = 1e-4
# Points on which the two ways to begin are compared.
TRIAL_POINTS = 4096
TRIAL_ITERATIONS = 4


def fit_sums(
    points: torch.Tensor,
    sizes: Sequence[int],
    *,
    weights: torch.Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Fit one table of each of `sizes` entries to the points of each of `S` independent subspaces.

    Two beginnings are tried on some of the points, and each subspace goes on from the better one: each table along directions
    of its own, where a product of scalar codes is one case of sums; or each table for what those before it left over.

    Parameters
    ----------
    points
        [S, N, d] fp32.
    sizes
        Entries of every table.
    weights
        [S, N], not negative, or None for equal weights.
    iterations
        Largest number of steps.
    generator
        A CPU generator; the only source of randomness.

    Returns
    -------
    list of torch.Tensor
        A table [S, K, d] fp32 of each size.

    Raises
    ------
    DataError
        As `kmeans`.
    """
    rows = max(1, CHUNK_COORDINATES // max(1, points[0].numel()))
    weights = torch.ones(points.shape[:2], device=points.device) if weights is None else weights
    parts = zip(points.split(rows), weights.split(rows), strict=True)
    tables_of_parts = [_fit(part, part_weights, sizes, iterations, generator) for part, part_weights in parts]
    return [torch.cat(tables) for tables in zip(*tables_of_parts, strict=True)]


def _fit(
    points: torch.Tensor, weights: torch.Tensor, sizes: Sequence[int], iterations: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return the tables of some subspaces: those of the better beginning, on some of the points, and then fitted to all."""
    stride = max(1, points.shape[1] // TRIAL_POINTS)
    sample, sample_weights = points[:, ::stride], weights[:, ::stride]
    beginnings = [_after_each_other(sample, sample_weights, sizes, iterations, generator)]
    if len(sizes) <= points.shape[-1]:
        beginnings.append(_side_by_side(sample, sample_weights, sizes, iterations, generator))
    trial_iterations = min(TRIAL_ITERATIONS, iterations)
    (tables, least), *others = (_fitted(sample, sample_weights, each, trial_iterations) for each in beginnings)
    for other, error in others:
        better = (error < least)[:, None, None]
        tables = [torch.where(better, new, old) for new, old in zip(other, tables, strict=True)]
        least = torch.minimum(error, least)
    return _fitted(points, weights, tables, iterations)[0]


def _fitted(
    points: torch.Tensor, weights: torch.Tensor, tables: list[torch.Tensor], iterations: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the tables after up to `iterations` steps and what error they leave, weighted mean [S] fp64."""
    previous = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    best, least = tables, previous
    total = weights.sum(1, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    for step in range(iterations + 1):
        sums = all_sums(tables)
        codes = nearest_centroids(points, sums)
        errors = (points - sums.gather(1, codes[..., None].expand(points.shape))).square().sum(-1)
        error = (errors * weights).sum(1, dtype=torch.float64) / total
        better = (error < least)[:, None, None]
        best = [torch.where(better, new, old) for new, old in zip(tables, best, strict=True)]
        least = torch.minimum(error, least)
        if step == iterations or bool((previous - error <= TOLERANCE * error).all()):
            break
        previous, tables = error, _solved(points, weights, codes, tables)
    return best, least


def _solved(points: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, tables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tables of least weighted squared error for fixed `codes` [S, N] of sums: one linear system per subspace.

    The system needs of the points only their weight and mean at each sum.
    """
    num_subspaces, _, dim = points.shape
    sizes = [table.shape[1] for table in tables]
    num_sums = math.prod(sizes)
    device = points.device
    flat = (codes + torch.arange(num_subspaces, device=device)[:, None] * num_sums).flatten()
    weighted = torch.cat((points * weights[..., None], weights[..., None]), dim=-1).flatten(0, 1).double()
    totals = torch.zeros(num_subspaces * num_sums, dim + 1, dtype=torch.float64, device=device).index_add_(0, flat, weighted)
    totals = totals.view(num_subspaces, num_sums, dim + 1)
    member = _members(sizes).to(device)  # [sums, entries]
    mass = totals[..., -1]
    normal = torch.einsum("ie,si,if->sef", member, mass, member)
    right = member.T @ totals[..., :-1]
    current = torch.cat(tables, dim=1).double()
    hold = RIDGE * mass.sum(1).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    system = normal + torch.diag_embed(hold.expand(-1, len(member.T)))
    entries = torch.linalg.solve(system, right + hold[..., None] * current).float()
    return list(entries.split(sizes, dim=1))


def _members(sizes: Sequence[int]) -> torch.Tensor:
    """Return which entries of the tables, one after the other, every sum is made of: [sums, entries] fp64 of 0 and 1."""
    every, step, columns = torch.arange(math.prod(sizes)), 1, []
    for size in sizes:
        columns.append(torch.nn.functional.one_hot(every // step % size, size))
        step *= size
    return torch.cat(columns, dim=1).double()


def _after_each_other(
    points: torch.Tensor, weights: torch.Tensor, sizes: Sequence[int], iterations: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return tables each of which was fitted to what those before it left over."""
    tables, rest = [], points
    for size in sizes:
        table = kmeans(rest, size, weights=weights, iterations=iterations, generator=generator).centroids
        codes = nearest_centroids(rest, table)
        rest = rest - table.gather(1, codes[..., None].expand(rest.shape))
        tables.append(table)
    return tables


def _side_by_side(
    points: torch.Tensor, weights: torch.Tensor, sizes: Sequence[int], iterations: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return tables each of which was fitted along principal axes of its own: the largest table gets the first axis, and so on.

    Axes that are left when each table has one go to the tables in turn, from the last one.
    """
    total = weights.sum(1, keepdim=True, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    shares = weights.double() / total
    mean = torch.einsum("sn,snd->sd", shares, points.double())
    centred = points.double() - mean[:, None]
    moment = torch.einsum("sn,snd,sne->sde", shares, centred, centred)
    axes = torch.linalg.eigh(moment).eigenvectors.flip(-1)  # largest first
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    owner = [order[a] if a < len(sizes) else order[-1 - (a - len(sizes)) % len(sizes)] for a in range(points.shape[-1])]
    tables: list[torch.Tensor] = []
    for i, size in enumerate(sizes):
        own = axes[..., [a for a, o in enumerate(owner) if o == i]]
        along = (centred @ own).float()
        centroids = kmeans(along, size, weights=weights, iterations=iterations, generator=generator).centroids
        offset = mean if i == 0 else torch.zeros_like(mean)
        tables.append((centroids.double() @ own.mT + offset[:, None]).float())
    return tables
