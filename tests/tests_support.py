"""Random tables and angles, and dull references, for tests of several rooms."""

import torch

from pqkv_kernels.format.layout import CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.tables import CodecTables

HEADS, DIM = 2, 16


def random_codebooks(layout: CodeLayout, heads: int, generator: torch.Generator) -> tuple[tuple[torch.Tensor, ...], ...]:
    return tuple(
        tuple(torch.randn(heads, g.num_subspaces, g.num_centroids, g.subspace_dim, generator=generator).half() for g in stage)
        for stage in layout.stages
    )


def random_angles(
    layout: RotaryLayout, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(*shape, layout.num_pairs, generator=generator) * 6.3
    return angle.cos(), angle.sin()


def key_tables(generator: torch.Generator, heads: int = HEADS, dim: int = DIM, nbits: int = 6) -> CodecTables:
    """Tables of keys before rotary embedding: blocks per pair, whole pairs permuted, two groups of different rates."""
    rotary = RotaryLayout(dim)
    layout = CodeLayout(((CodeGroup(dim // 8, nbits, 4), CodeGroup(dim // 4, 8, 2)),))
    blocks = torch.eye(2) + 0.3 * torch.randn(heads, dim // 2, 2, 2, generator=generator)
    pairs = torch.stack([torch.randperm(dim // 2, generator=generator) for _ in range(heads)])
    permutation = torch.stack((pairs, pairs + dim // 2), dim=-1).flatten(1).to(torch.int16)
    return CodecTables(layout, random_codebooks(layout, heads, generator), blocks, permutation, rotary)


def value_tables(generator: torch.Generator, heads: int = HEADS, dim: int = DIM, nbits: int = 5) -> CodecTables:
    """Tables of values: a dense map, two additive stages."""
    layout = CodeLayout(((CodeGroup(dim // 4, nbits, 4),), (CodeGroup(dim // 2, 4, 2),)))
    matrix = torch.eye(dim) + 0.3 * torch.randn(heads, dim, dim, generator=generator) / dim**0.5
    return CodecTables(layout, random_codebooks(layout, heads, generator), matrix)


def dull_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of [B, H, Tq, D] over [B, Hkv, T, D] in fp64; `valid` [B, 1 or Tq, T]; rows without tokens are zero."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.double().repeat_interleave(groups, 1), values.double().repeat_interleave(groups, 1)
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits.masked_fill(~valid[:, None], -torch.inf), -1).nan_to_num(nan=0.0)
    return weights @ values
