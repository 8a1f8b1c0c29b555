"""Product quantizer codebooks: one k-means per stage and group over all heads and subspaces. Knows points in code space."""

from dataclasses import dataclass, replace

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.additive import fit_sums
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_kernels.dispatch import quantize
from pqkv_kernels.format.layout import CodeGroup, CodeLayout
from pqkv_kernels.reference.encode import dequantize
from pqkv_kernels.reference.merged_stages import Share, joint_layout

Codebooks = tuple[tuple[torch.Tensor, ...], ...]


def fit_product(
    points: torch.Tensor,
    layout: CodeLayout,
    *,
    given: Codebooks = (),
    weights: torch.Tensor | None = None,
    iterations: int = 25,
    seed: int = 0,
) -> Codebooks:
    """Fit the codebooks of `layout` to points in code space.

    Stages that an encoder takes together (`reference.merged_stages`) are fitted together; others, each to what the stages
    before it, with their codebooks as stored, leave over.

    Parameters
    ----------
    points
        [Hkv, N, D] fp32.
    layout
        How channels are grouped into codes.
    given
        Codebooks of the first stages, any float dtype; the others are fitted.
    weights
        [Hkv, N], not negative, or None for equal weights.
    iterations
        Largest number of k-means steps of each codebook.
    seed
        The only source of randomness.

    Returns
    -------
    tuple of tuple of torch.Tensor
        ``codebooks[stage][group]``, [Hkv, M, ksub, dsub] fp16.

    Raises
    ------
    DataError
        If there are fewer points than centroids, points are not finite, or centroids leave the range of fp16.
    """
    generator = torch.Generator().manual_seed(seed)
    joint = joint_layout(layout)
    residual, done = points.float(), 0
    codebooks = [tuple(stored(table) for table in stage) for stage in given]
    for index, (stage, shares) in enumerate(zip(joint.layout.stages, joint.shares, strict=True)):
        members = range(done, done + len(shares[0]))
        done = members.stop
        if done > len(given):
            tables = _fit_stage(residual, stage, shares, weights, iterations, generator)
            codebooks += [_stage_tables(tables, shares, member) for member in members]
        if index + 1 < len(joint.layout.stages):
            part = replace(layout, stages=layout.stages[members.start : done])
            residual = residual - reconstruct(residual, part, tuple(codebooks[members.start : done]))
    return tuple(codebooks)


def reconstruct(points: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> torch.Tensor:
    """Return what code-space `points` [Hkv, N, D] become when coded and decoded, fp32."""
    return dequantize(quantize(points[None], layout, codebooks), layout, codebooks)[0]


def relative_error(
    points: torch.Tensor,
    layout: CodeLayout,
    codebooks: Codebooks,
    weights: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted ``sum ||x - x'||^2 / sum ||x||^2`` of each head, [Hkv] fp32; 0 where all points are zero.

    Parameters
    ----------
    points
        [Hkv, N, D] in code space.
    layout, codebooks
        The codec.
    weights
        [Hkv, N] or None.
    known
        What is known of the points and not coded, [Hkv, N, D], or None.
    """
    points = points.float()
    coded = points if known is None else points - known
    error = (coded - reconstruct(coded, layout, codebooks)).square().sum(-1, dtype=torch.float64)
    energy = points.square().sum(-1, dtype=torch.float64)
    if weights is not None:
        error, energy = error * weights, energy * weights
    total = energy.sum(-1)
    return torch.where(total > 0, error.sum(-1) / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0).float()


def stored(centroids: torch.Tensor) -> torch.Tensor:
    """Return `centroids` as an artifact keeps them, in fp16.

    Raises
    ------
    DataError
        If they leave its range.
    """
    rounded = centroids.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise DataError(
            f"a centroid reaches {float(centroids.abs().max()):.3g}; expected at most {torch.finfo(torch.float16).max:.0f}, "
            "the range of fp16; scale the vectors down before they are coded"
        )
    return rounded


def _fit_stage(
    points: torch.Tensor,
    stage: tuple[CodeGroup, ...],
    shares: tuple[tuple[Share, ...], ...],
    weights: torch.Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> list[list[torch.Tensor]]:
    """Return for every joint group of a stage the table [Hkv, M, ksub, dsub] of each share of it, for `points` [Hkv, N, D]."""
    offset, tables = 0, []
    for group, shared in zip(stage, shares, strict=True):
        part = points[..., offset : offset + group.num_channels]
        tables.append(_fit_group(part, group, shared, weights, iterations, generator))
        offset += group.num_channels
    return tables


def _fit_group(
    points: torch.Tensor,
    group: CodeGroup,
    shares: tuple[Share, ...],
    weights: torch.Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Return the tables [Hkv, M, ksub, dsub] fp16 of one group's channels, `points` [Hkv, N, M * dsub]."""
    num_heads, num_vectors, _ = points.shape
    split = points.unflatten(-1, (group.num_subspaces, group.subspace_dim)).transpose(1, 2).flatten(0, 1)
    weights = None if weights is None else weights.repeat_interleave(group.num_subspaces, dim=0)
    if len(shares) == 1:
        tables = [kmeans(split, group.num_centroids, weights=weights, iterations=iterations, generator=generator).centroids]
    else:
        sizes = [1 << share.nbits for share in shares]
        tables = fit_sums(split, sizes, weights=weights, iterations=iterations, generator=generator)
    return [stored(table).unflatten(0, (num_heads, group.num_subspaces)) for table in tables]


def _stage_tables(
    tables: list[list[torch.Tensor]], shares: tuple[tuple[Share, ...], ...], stage: int
) -> tuple[torch.Tensor, ...]:
    """Return the codebooks of one stored stage: of neighbouring joint groups that share a table, their parts of it together."""
    parts: dict[int, list[torch.Tensor]] = {}
    for group_tables, shared in zip(tables, shares, strict=True):
        for table, share in zip(group_tables, shared, strict=True):
            if share.stage == stage:
                parts.setdefault(share.group, []).append(table)
    return tuple(torch.cat(of_group, dim=1) for _, of_group in sorted(parts.items()))


@dataclass(frozen=True, slots=True)
class Prototypes:
    """`centroids`: one [Hkv, 1, C, D] fp32 for each whole-vector stage; `residual` [Hkv, N, D] fp32: what they leave over."""

    centroids: tuple[torch.Tensor, ...]
    residual: torch.Tensor


def num_prototype_stages(layout: CodeLayout) -> int:
    """Return how many stages code the whole vector at once before the last one, which never counts as such.

    Nor do stages that an encoder takes together: their tables are fitted together, too.
    """
    joint, count = joint_layout(layout), 0
    for stage, shares in zip(joint.layout.stages[:-1], joint.shares, strict=False):
        if len(stage) != 1 or stage[0].num_subspaces != 1 or len(shares[0]) > 1:
            break
        count += 1
    return count


def fit_prototypes(
    points: torch.Tensor,
    layout: CodeLayout,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 25,
    seed: int = 0,
) -> Prototypes:
    """Fit the whole-vector stages of `layout`, each to what those before it left over.

    They are fitted before channels are permuted or rotated: both are distances to them, so neither changes a code.

    Parameters
    ----------
    points
        [Hkv, N, D] fp32 in the space where L2 is the error that matters.
    layout
        Its leading stages of one subspace are fitted; there may be none.
    weights
        [Hkv, N], not negative, or None for equal weights.
    iterations, seed
        As for `fit_product`.

    Raises
    ------
    DataError
        If there are fewer points than prototypes, points are not finite, or prototypes leave the range of fp16.
    """
    generator = torch.Generator().manual_seed(seed)
    residual, centroids = points.float(), []
    for stage in layout.stages[: num_prototype_stages(layout)]:
        result = kmeans(residual, stage[0].num_centroids, weights=weights, iterations=iterations, generator=generator)
        centroids.append(result.centroids[:, None])
        residual = residual - reconstruct(residual, CodeLayout((stage,)), ((stored(centroids[-1]),),))
    return Prototypes(tuple(centroids), residual)
