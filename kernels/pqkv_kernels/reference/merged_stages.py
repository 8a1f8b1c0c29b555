"""Additive stages over the same parts, taken together: the sums of their centroids are searched as one table.

A code of 4 bits and a code of 4 bits for the same two channels choose among 256 sums. To find the nearest sum costs what one
table of 256 entries costs; to find the nearest of 16 and then the nearest of 16 for what is left gives another, worse sum.
Only encoders and fits see stages so; what is stored, and how it is read, is stage by stage. Knows layouts and centroids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from pqkv_kernels.format.layout import MOST_JOINT_NBITS, CodeGroup, CodeLayout

Codebooks = tuple[tuple[torch.Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """Where one stage's codes of a joint group lie: its table `group` of `stage`, from subspace `first` on, and in a page."""

    stage: int
    group: int
    first: int
    nbits: int
    byte_offset: int


@dataclass(frozen=True, slots=True)
class JointLayout:
    """`layout`: stages as an encoder sees them; `shares[stage][group]`: the stored codes that each is made of, lowest first."""

    layout: CodeLayout
    shares: tuple[tuple[tuple[Share, ...], ...], ...]

    def codebooks(self, stored: Codebooks) -> Codebooks:
        """Return the codebooks of `layout` from the `stored` ones: these themselves where nothing is joint, else fp32 sums."""
        if all(len(shares) == 1 for stage in self.shares for shares in stage):
            return stored
        return tuple(
            tuple(_sums(group, shares, stored) for group, shares in zip(*of_stage, strict=True))
            for of_stage in zip(self.layout.stages, self.shares, strict=True)
        )

    def split(self, codes: list[torch.Tensor], stored: CodeLayout) -> list[torch.Tensor]:
        """Return the codes [B, Hkv, M, T] of the groups of `stored` in storage order, from those of `layout`."""
        slices: dict[tuple[int, int], list[torch.Tensor]] = {}
        shares = [group for stage in self.shares for group in stage]
        for joint, group in zip(codes, shares, strict=True):
            low = 0
            for share in group:
                part = (joint >> low) & ((1 << share.nbits) - 1) if len(group) > 1 else joint
                slices.setdefault((share.stage, share.group), []).append(part)
                low += share.nbits
        parts = [slices[stage, index] for stage, index, *_ in stored.spans()]
        return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def all_sums(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sums [..., product of K, d] of one entry of each of `tables` [..., K, d], the first one's entries fastest."""
    total = tables[0]
    for table in tables[1:]:
        total = (table[..., :, None, :] + total[..., None, :, :]).flatten(-3, -2)
    return total


@lru_cache(maxsize=256)
def joint_layout(layout: CodeLayout) -> JointLayout:
    """Return the stages of `layout` as an encoder sees them.

    Neighbouring stages that cut the channels into the same subspaces are one, while all their codes of a subspace together
    have at most `MOST_JOINT_NBITS` bits. Its groups are the runs of subspaces in which no stage changes its table.
    """
    rows = [_subspaces(layout, stage) for stage in range(len(layout.stages))]
    runs: list[list[int]] = []
    for stage, row in enumerate(rows):
        if runs and _joins([rows[s] for s in runs[-1]], row):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    stages, shares = [], []
    for run in runs:
        groups = [list(members) for _, members in groupby(zip(*(rows[s] for s in run), strict=True), key=_table)]
        stages.append(tuple(CodeGroup(len(g), sum(p.nbits for p, _ in g[0]), g[0][0][1]) for g in groups))
        shares.append(tuple(tuple(share for share, _ in g[0]) for g in groups))
    return JointLayout(CodeLayout(tuple(stages)), tuple(shares))


def _subspaces(layout: CodeLayout, stage: int) -> list[tuple[Share, int]]:
    """Return what a stage stores of every subspace, and its channels."""
    return [
        (Share(stage, index, m, group.nbits, byte_offset + m * group.page_bytes // group.num_subspaces), group.subspace_dim)
        for of_stage, index, group, byte_offset, _ in layout.spans()
        if of_stage == stage
        for m in range(group.num_subspaces)
    ]


def _joins(run: list[list[tuple[Share, int]]], row: list[tuple[Share, int]]) -> bool:
    """Return whether a stage cuts the channels as those of `run` do, and all their codes of a subspace are few bits."""
    same = [dim for _, dim in run[0]] == [dim for _, dim in row]
    return same and all(sum(share.nbits for share, _ in codes) <= MOST_JOINT_NBITS for codes in zip(*run, row, strict=True))


def _table(codes: tuple[tuple[Share, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return what is the same for neighbouring subspaces of one joint group: the tables, and with them bits and channels."""
    return tuple((share.stage, share.group) for share, _ in codes)


def _sums(group: CodeGroup, shares: tuple[Share, ...], stored: Codebooks) -> torch.Tensor:
    """Return the sums [Hkv, M, ksub, dsub] fp32 of the tables of `shares`."""
    return all_sums([stored[s.stage][s.group][:, s.first : s.first + group.num_subspaces].float() for s in shares])
