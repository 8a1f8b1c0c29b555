"""Codes of whole vectors, the first stages of a code. Knows points in code space; nothing of keys, values or files.

Vectors of one head gather around a few hundred typical ones, as tokens and their contexts repeat. One code for the nearest of
them costs ten bits of a vector and takes away, in all channels at once, what codes of parts would each pay for again.
"""

from dataclasses import dataclass

import torch

from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_cli.quantizers.product import reconstruct, stored
from pqkv_kernels.joint import joint_layout
from pqkv_kernels.layout import CodeLayout


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
        found = kmeans(residual, stage[0].num_centroids, weights=weights, iterations=iterations, generator=generator)
        centroids.append(found.centroids[:, None])
        residual = residual - reconstruct(residual, CodeLayout((stage,)), ((stored(centroids[-1]),),))
    return Prototypes(tuple(centroids), residual)
