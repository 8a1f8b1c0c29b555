"""Encode and decode: what codes mean, in plain fp32 torch. Defines the meaning of every faster implementation."""

import torch
import torch.nn.functional as F

from pqkv_kernels.angles import Angles
from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS, CodeLayout, RotaryLayout
from pqkv_kernels.nearest import nearest_centroids
from pqkv_kernels.packing import pack_known, unpack_codes
from pqkv_kernels.rope import rotate, unrotate
from pqkv_kernels.tables import CodecTables

Codebooks = tuple[tuple[torch.Tensor, ...], ...]


def encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode whole pages of vectors.

    Parameters
    ----------
    x
        Keys (after rotary embedding, as a cache receives them) or values, [B, Hkv, T, D], T a multiple of 64.
    tables
        The codec.
    angles
        ``(cos, sin)`` of every token, each [B, T, rotary_dim / 2] fp32; needed where ``tables.rotary`` is set.

    Returns
    -------
    torch.Tensor
        Pages, [B, T / 64, Hkv, page_bytes] uint8.

    Raises
    ------
    KernelError
        If shapes do not fit or angles are missing.
    """
    if x.shape[2] % PAGE_TOKENS:
        raise KernelError(f"{x.shape[2]} tokens to encode; expected a multiple of {PAGE_TOKENS}")
    codes = quantize(to_code_space(x, tables, angles), tables.layout, tables.codebooks)
    packed = []
    for (_, _, group, _, _), group_codes in zip(tables.layout.spans(), codes, strict=True):
        pages = pack_known(
            group_codes.unflatten(-1, (x.shape[2] // PAGE_TOKENS, PAGE_TOKENS)), group.nbits
        )  # [B, Hkv, M, P, bytes]
        packed.append(pages.permute(0, 3, 1, 2, 4).flatten(3))
    return torch.cat(packed, dim=-1)


def decode(pages: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Return the model-space vectors [B, Hkv, 64 * P, D] fp32 that `pages` [B, P, Hkv, page_bytes] stand for."""
    return from_code_space(decode_codes(pages, tables), tables, angles)


def round_trip(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True) -> torch.Tensor:
    """Return what `x` [B, Hkv, T, D] (any T) becomes when encoded and decoded, fp32.

    Without `rotated`, `x` are keys before rotary embedding, and so is what is returned.
    """
    coded = to_code_space(x, tables, angles, rotated=rotated)
    codes = quantize(coded, tables.layout, tables.codebooks)
    return from_code_space(dequantize(codes, tables.layout, tables.codebooks), tables, angles, rotated=rotated)


def decode_codes(pages: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, 64 * P, D] fp32 of `pages` [B, P, Hkv, page_bytes] uint8.

    Raises
    ------
    KernelError
        If the pages are not of this layout.
    """
    found = (pages.ndim, *pages.shape[2:])
    if found != (4, tables.num_heads, tables.layout.page_bytes):
        raise KernelError(
            f"pages have shape {list(pages.shape)}; expected [B, P, {tables.num_heads}, {tables.layout.page_bytes}]"
        )
    codes = []
    for _, _, group, byte_offset, _ in tables.layout.spans():
        span = pages[..., byte_offset : byte_offset + group.page_bytes].unflatten(
            -1, (group.num_subspaces, group.page_bytes // group.num_subspaces)
        )
        codes.append(unpack_codes(span, group.nbits).permute(0, 2, 3, 1, 4).flatten(3))  # [B, Hkv, M, T]
    return dequantize(codes, tables.layout, tables.codebooks)


def quantize(x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
    """Return the codes [B, Hkv, M, T] int64 of every group in storage order for code-space `x` [B, Hkv, T, D].

    Additive stages are greedy: a stage codes what the stages before it left over.
    """
    batch, num_heads, num_tokens, _ = x.shape
    codes: list[torch.Tensor] = []
    residual = x.float()
    for i, stage in enumerate(layout.stages):
        offset, stage_codes = 0, []
        for group, table in zip(stage, codebooks[i], strict=True):
            part = residual[..., offset : offset + group.num_channels].unflatten(-1, (group.num_subspaces, group.subspace_dim))
            points = part.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)  # [Hkv * M, B * T, dsub]
            found = nearest_centroids(points, table.float().flatten(0, 1))
            shape = (num_heads, group.num_subspaces, batch, num_tokens)
            stage_codes.append(found.view(shape).permute(2, 0, 1, 3))
            offset += group.num_channels
        codes += stage_codes
        if i + 1 < len(layout.stages):
            residual = residual - _lookup_stage(stage_codes, codebooks[i])
    return codes


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


def to_code_space(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True) -> torch.Tensor:
    """Return code-space vectors [B, Hkv, T, D] fp32 of model-space `x` [B, Hkv, T, D].

    Without `rotated`, `x` are keys before rotary embedding and need no angles.

    Raises
    ------
    KernelError
        If `x` is not of the tables' heads and channels, or angles are needed and missing.
    """
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != (tables.num_heads, tables.layout.head_dim):
        raise KernelError(f"vectors have shape {list(x.shape)}; expected [B, {tables.num_heads}, T, {tables.layout.head_dim}]")
    x = x.float()
    if tables.rotary is not None and rotated:
        cos, sin = _required(angles)
        x = unrotate(x, cos[:, None], sin[:, None], tables.rotary)
    if tables.map is not None:
        x = x * tables.map[:, None] if tables.map.ndim == 2 else _mapped(x, tables.map, tables.rotary)
    return x if tables.permutation is None else _take_channels(x, tables.permutation)


def from_code_space(
    x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True
) -> torch.Tensor:
    """Undo `to_code_space`."""
    if tables.permutation is not None:
        x = _take_channels(x, tables.permutation.long().argsort(-1))
    if tables.map is not None:
        x = x / tables.map[:, None] if tables.inverse is None else _mapped(x, tables.inverse, tables.rotary)
    if tables.rotary is not None and rotated:
        cos, sin = _required(angles)
        x = rotate(x, cos[:, None], sin[:, None], tables.rotary)
    return x


def _mapped(x: torch.Tensor, matrices: torch.Tensor, rotary: RotaryLayout | None) -> torch.Tensor:
    """Apply matrices [Hkv, D, D], or blocks [Hkv, D / 2, 2, 2] over the channel pairs of `rotary`."""
    if matrices.ndim == 3:
        return x @ matrices.mT
    assert rotary is not None  # CodecTables accepts blocks only together with it
    first, second = torch.tensor(rotary.blocks(x.shape[-1]), device=x.device).unbind(1)
    a, b = x[..., first], x[..., second]
    rows = matrices[:, None]  # [Hkv, 1, D / 2, 2, 2]
    mapped = torch.empty_like(x)
    mapped[..., first] = rows[..., 0, 0] * a + rows[..., 0, 1] * b
    mapped[..., second] = rows[..., 1, 0] * a + rows[..., 1, 1] * b
    return mapped


def _lookup_stage(codes: list[torch.Tensor], tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    parts = []
    for group_codes, table in zip(codes, tables, strict=True):
        num_heads, num_subspaces, num_centroids, _ = table.shape
        first_row = torch.arange(num_heads * num_subspaces, device=table.device) * num_centroids
        rows = group_codes.long() + first_row.view(num_heads, num_subspaces, 1)
        vectors = F.embedding(rows, table.float().flatten(0, 2))  # [B, Hkv, M, T, dsub]
        parts.append(vectors.transpose(2, 3).flatten(3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _take_channels(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, index.long()[None, :, None].expand(x.shape))


def _required(angles: Angles | None) -> Angles:
    if angles is None:
        raise KernelError("keys coded before rotary embedding need the angles of their positions; none were given")
    return angles
