"""Product quantizer codebooks: one k-means per stage and group over all heads and subspaces. Knows points in code space."""

from dataclasses import replace

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_kernels.layout import CodeGroup, CodeLayout
from pqkv_kernels.quantize import dequantize, quantize

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

    Each additive stage is fitted to what the stages before it, with their codebooks as stored, leave over.

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
    residual = points.float()
    codebooks: list[tuple[torch.Tensor, ...]] = []
    for index, stage in enumerate(layout.stages):
        if index < len(given):
            codebooks.append(tuple(stored(table) for table in given[index]))
        else:
            codebooks.append(_fit_stage(residual, stage, weights, iterations, generator))
        if len(codebooks) < len(layout.stages):
            residual = residual - reconstruct(residual, replace(layout, stages=(stage,)), (codebooks[-1],))
    return tuple(codebooks)


def reconstruct(points: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> torch.Tensor:
    """Return what code-space `points` [Hkv, N, D] become when coded and decoded, fp32."""
    return dequantize(quantize(points[None], layout, codebooks), layout, codebooks)[0]


def relative_error(
    points: torch.Tensor, layout: CodeLayout, codebooks: Codebooks, weights: torch.Tensor | None = None
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
    """
    points = points.float()
    error = (points - reconstruct(points, layout, codebooks)).square().sum(-1, dtype=torch.float64)
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
    weights: torch.Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    """Return the codebooks of one stage's groups for `points` [Hkv, N, D]."""
    offset, tables = 0, []
    for group in stage:
        part = points[..., offset : offset + group.num_channels]
        tables.append(_fit_group(part, group, weights, iterations, generator))
        offset += group.num_channels
    return tuple(tables)


def _fit_group(
    points: torch.Tensor, group: CodeGroup, weights: torch.Tensor | None, iterations: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the codebook [Hkv, M, ksub, dsub] fp16 of one group's channels, `points` [Hkv, N, M * dsub]."""
    num_heads, num_points, _ = points.shape
    split = points.reshape(num_heads, num_points, group.num_subspaces, group.subspace_dim).transpose(1, 2).flatten(0, 1)
    spread = None
    if weights is not None:
        spread = weights[:, None].expand(num_heads, group.num_subspaces, num_points).flatten(0, 1)
    result = kmeans(split, group.num_centroids, weights=spread, iterations=iterations, generator=generator)
    return stored(result.centroids).view(num_heads, group.num_subspaces, group.num_centroids, group.subspace_dim)
