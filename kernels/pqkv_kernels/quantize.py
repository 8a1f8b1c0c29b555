"""Code-space vectors to codes and back, in plain fp32 torch: what an encoder looks for. Knows no packing and no maps.

Stages that code the same parts are searched for the nearest sum (`pqkv_kernels.joint`). Others are greedy: a stage codes what
the stages before it left over. Only a code of the whole vector with one stage after it (a prototype and its parts) is chosen
for the sum: of the few nearest prototypes the one whose parts fit best. What is stored and how it is read depend on none of it.
"""

import torch
import torch.nn.functional as F

from pqkv_kernels.joint import joint_layout
from pqkv_kernels.layout import TRIED_PROTOTYPES, CodeGroup, CodeLayout
from pqkv_kernels.native_parts import best_prototypes, can_choose
from pqkv_kernels.nearest import nearest_centroids, nearest_few

Codebooks = tuple[tuple[torch.Tensor, ...], ...]


def quantize(x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
    """Return the codes [B, Hkv, M, T] int64 of every group in storage order for code-space `x` [B, Hkv, T, D].

    Where the joint layout has prototypes, the `TRIED_PROTOTYPES` nearest are tried and the vector of least squared error is
    stored; of equal ones that of the nearer prototype.
    """
    joint = joint_layout(layout)
    return joint.split(_chosen(x.float(), joint.layout, joint.codebooks(codebooks)), layout)


def _chosen(x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
    if not layout.has_prototypes or not x.numel():
        return _greedy(x, layout.stages, codebooks)
    table = codebooks[0][0][:, 0].float()
    few = _nearest_prototypes(x, table)
    if can_choose(x, layout.stages[1]):
        return best_prototypes(x, few, table, layout.stages[1], codebooks[1])
    return _best_of(x, few, table, layout, codebooks)


def dequantize(codes: list[torch.Tensor], layout: CodeLayout, codebooks: Codebooks) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, T, D] fp32 of `codes` as `quantize` returns them."""
    total: torch.Tensor | None = None
    start = 0
    for i, stage in enumerate(layout.stages):
        part = _lookup_stage(codes[start : start + len(stage)], codebooks[i])
        total = part if total is None else total + part
        start += len(stage)
    assert total is not None  # a layout has at least one stage
    return total


def _greedy(x: torch.Tensor, stages: tuple[tuple[CodeGroup, ...], ...], codebooks: Codebooks) -> list[torch.Tensor]:
    codes: list[torch.Tensor] = []
    for i, stage in enumerate(stages):
        stage_codes = _nearest_parts(x, stage, codebooks[i])
        codes += stage_codes
        if i + 1 < len(stages):
            x = x - _lookup_stage(stage_codes, codebooks[i])
    return codes


def _nearest_parts(x: torch.Tensor, stage: tuple[CodeGroup, ...], tables: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the codes [B, Hkv, M, T] of one stage's groups for `x` [B, Hkv, T, D]."""
    batch, num_heads, num_tokens, _ = x.shape
    offset, codes = 0, []
    for group, table in zip(stage, tables, strict=True):
        part = x[..., offset : offset + group.num_channels].unflatten(-1, (group.num_subspaces, group.subspace_dim))
        points = part.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)  # [Hkv * M, B * T, dsub]
        found = nearest_centroids(points, table.float().flatten(0, 1))
        shape = (num_heads, group.num_subspaces, batch, num_tokens)
        codes.append(found.view(shape).permute(2, 0, 1, 3))
        offset += group.num_channels
    return codes


def _nearest_prototypes(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the numbers [B, Hkv, n, T] of the prototypes `table` [Hkv, C, D] nearest to `x` [B, Hkv, T, D], nearest first."""
    points = x.transpose(0, 1).flatten(1, 2)  # [Hkv, B * T, D]
    few = nearest_few(points, table, min(TRIED_PROTOTYPES, table.shape[1]))  # [Hkv, n, B * T]
    return few.view(*few.shape[:2], x.shape[0], x.shape[2]).permute(2, 0, 1, 3)


def _best_of(
    x: torch.Tensor, few: torch.Tensor, table: torch.Tensor, layout: CodeLayout, codebooks: Codebooks
) -> list[torch.Tensor]:
    """Return the codes of the best of the prototypes `few` [B, Hkv, n, T] of `table` [Hkv, C, D] and of its parts."""
    heads = torch.arange(len(table), device=x.device)[:, None]
    best: list[torch.Tensor] = []
    for tried in few.unbind(2):
        residual = x - table[heads, tried]
        parts = _nearest_parts(residual, layout.stages[1], codebooks[1])
        found = [tried[:, :, None], *parts]
        error = (residual - _lookup_stage(parts, codebooks[1])).square().sum(-1)[:, :, None]
        if not best:
            best, least = found, error
            continue
        better = error < least
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        least = torch.where(better, error, least)
    return best


def _lookup_stage(codes: list[torch.Tensor], tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    parts = []
    for group_codes, table in zip(codes, tables, strict=True):
        num_heads, num_subspaces, num_centroids, _ = table.shape
        first_row = torch.arange(num_heads * num_subspaces, device=table.device) * num_centroids
        rows = group_codes.long() + first_row.view(num_heads, num_subspaces, 1)
        vectors = F.embedding(rows, table.float().flatten(0, 2))  # [B, Hkv, M, T, dsub]
        parts.append(vectors.transpose(2, 3).flatten(3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
