"""Where each centroid of a codec would serve better, from what its cell holds. Knows codes and sums; no model.

A centroid that stands for parts of vectors, of weight `w`, should be their weighted mean. Its step there is the weighted sum of
their errors over the sum of weights, which is mostly chance where cells are small. So windows are dealt to two halves, and
weight is added to every cell until the steps of one half serve the other best; where no amount serves, nothing moves.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from pqkv_cli.quantizers.product import stored
from pqkv_kernels.layout import CodeGroup
from pqkv_kernels.tables import CodecTables

# What a part of a vector counts for: all the same, its Fisher information (what a small error of it costs), or the root of
# that, which is less at the mercy of the few tokens that are drawn.
Weighting = Literal["equal", "root", "fisher"]
# Weight added to every cell, in means over the cells of a group.
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class CodecSums:
    """Sums over the vectors of every cell of one codec."""

    def __init__(self, tables: CodecTables, weighting: Weighting) -> None:
        self._tables, self._weighting = tables, weighting
        self._groups = [_GroupSums(group, tables.num_heads) for stage in tables.layout.stages for group in stage]

    def add(self, half: int, codes: Sequence[torch.Tensor], error: torch.Tensor, score: torch.Tensor) -> None:
        """Count vectors into half 0 or 1.

        Parameters
        ----------
        half
            Which.
        codes
            [B, Hkv, M, T] of every group in storage order.
        error
            What the decoded vectors lack in code space, [B, Hkv, T, D].
        score
            Gradient of the log-likelihood of tokens drawn from the model with respect to the decoded vectors, [B, Hkv, T, D];
            the mean of its square is the Fisher information.
        """
        for sums, found, (_, _, group, _, start) in zip(self._groups, codes, self._tables.layout.spans(), strict=True):
            channels = slice(start, start + group.num_channels)
            sums.add(half, found, error[..., channels], _weight(score[..., channels], group.num_subspaces, self._weighting))

    def steps(self) -> list[torch.Tensor]:
        """Return the step [Hkv, M, ksub, dsub] fp32 of every group."""
        return [sums.step() for sums in self._groups]


def moved(tables: CodecTables, steps: Sequence[torch.Tensor]) -> CodecTables:
    """Return `tables` with `steps` added to their codebooks, as an artifact stores them.

    Raises
    ------
    DataError
        If centroids leave the range of fp16.
    """
    left = iter(steps)
    codebooks = tuple(
        tuple(stored(table.float() + next(left).to(table.device)) for table in stage) for stage in tables.codebooks
    )
    return replace(tables, codebooks=codebooks)


class _GroupSums:
    """Of the ``R = Hkv * M * ksub`` cells of one group, by half: weighted errors [2, R, dsub] and weights [2, R]."""

    def __init__(self, group: CodeGroup, num_heads: int) -> None:
        self._shape = (num_heads, group.num_subspaces, group.num_centroids, group.subspace_dim)
        rows = num_heads * group.num_subspaces * group.num_centroids
        self._errors, self._weights = torch.zeros(2, rows, group.subspace_dim), torch.zeros(2, rows)

    def add(self, half: int, codes: torch.Tensor, error: torch.Tensor, weight: torch.Tensor) -> None:
        num_heads, num_subspaces, num_centroids, dim = self._shape
        first = torch.arange(num_heads * num_subspaces, device=codes.device).view(num_heads, num_subspaces, 1)
        rows = (codes + first * num_centroids).flatten().cpu()
        parts = error.unflatten(-1, (num_subspaces, dim)).transpose(2, 3)  # [B, Hkv, M, T, dsub]
        self._errors[half].index_add_(0, rows, (parts * weight[..., None]).reshape(-1, dim).cpu())
        self._weights[half].index_add_(0, rows, weight.flatten().cpu())

    def step(self) -> torch.Tensor:
        mean = self._weights.mean()
        gains = [sum(self._gain(half, damping * mean) for half in (0, 1)) for damping in DAMPINGS]
        best = max(range(len(gains)), key=gains.__getitem__)
        if not gains[best] > 0:
            return torch.zeros(self._shape)
        step: torch.Tensor = self._errors.sum(0) / (self._weights.sum(0) + DAMPINGS[best] * mean)[:, None]
        return step.view(self._shape)

    def _gain(self, half: int, added: torch.Tensor) -> float:
        """Return what the step of the other half would take off the weighted squared error of this one; NaN without weight."""
        step = self._errors[1 - half] / (self._weights[1 - half] + added)[:, None]
        change = 2 * self._errors[half] * step - self._weights[half, :, None] * step.square()
        return float(change.sum(dtype=torch.float64))


def _weight(score: torch.Tensor, num_subspaces: int, weighting: Weighting) -> torch.Tensor:
    """Return the weight [B, Hkv, M, T] of every part of the vectors that `score` [B, Hkv, T, M * dsub] belongs to."""
    information: torch.Tensor = score.float().unflatten(-1, (num_subspaces, -1)).square().mean(dim=-1).transpose(2, 3)
    if weighting == "equal":
        return torch.ones_like(information)
    return information.sqrt() if weighting == "root" else information
