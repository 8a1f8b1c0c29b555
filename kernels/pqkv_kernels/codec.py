"""Encode and decode: what codes mean, in plain fp32 torch. Defines the meaning of every faster implementation."""

from functools import lru_cache

import torch

from pqkv_kernels.angles import Angles
from pqkv_kernels.checks import check_angles
from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS, RotaryLayout
from pqkv_kernels.native_points import can_place, native_points
from pqkv_kernels.packing import pack_known, unpack_codes
from pqkv_kernels.quantize import dequantize, quantize
from pqkv_kernels.rope import rotate, unrotate
from pqkv_kernels.tables import CodecTables


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
    turn = _turn(tables, angles, x) if rotated else None
    if can_place(x, tables):
        return native_points(x, tables, turn)
    x = x.float()
    if turn is not None and tables.rotary is not None:
        x = unrotate(x, turn[0][:, None], turn[1][:, None], tables.rotary)
    if tables.map is not None:
        x = x * tables.map[:, None] if tables.map.ndim == 2 else _mapped(x, tables.map, tables.rotary)
    return x if tables.permutation is None else _take_channels(x, tables.permutation)


def from_code_space(
    x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True
) -> torch.Tensor:
    """Undo `to_code_space`."""
    if tables.permutation is not None:
        x = _take_channels(x, tables.inverse_permutation())
    if tables.map is not None:
        x = x / tables.map[:, None] if tables.inverse is None else _mapped(x, tables.inverse, tables.rotary)
    turn = _turn(tables, angles, x) if rotated else None
    if turn is not None and tables.rotary is not None:
        x = rotate(x, turn[0][:, None], turn[1][:, None], tables.rotary)
    return x


def _mapped(x: torch.Tensor, matrices: torch.Tensor, rotary: RotaryLayout | None) -> torch.Tensor:
    """Apply matrices [Hkv, D, D], or blocks [Hkv, D / 2, 2, 2] over the channel pairs of `rotary`."""
    if matrices.ndim == 3:
        return x @ matrices.mT
    assert rotary is not None  # CodecTables accepts blocks only together with it
    first, second = _block_channels(rotary, x.shape[-1], x.device)
    a, b = x[..., first], x[..., second]
    rows = matrices[:, None]  # [Hkv, 1, D / 2, 2, 2]
    mapped = torch.empty_like(x)
    mapped[..., first] = rows[..., 0, 0] * a + rows[..., 0, 1] * b
    mapped[..., second] = rows[..., 1, 0] * a + rows[..., 1, 1] * b
    return mapped


@lru_cache
def _block_channels(rotary: RotaryLayout, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second channel of every block; kept, because making them lets a GPU wait for the host."""
    first, second = torch.tensor(rotary.blocks(dim)).unbind(1)
    return first.to(device), second.to(device)


def _take_channels(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, index.long()[None, :, None].expand(x.shape))


def _turn(tables: CodecTables, angles: Angles | None, x: torch.Tensor) -> Angles | None:
    """Return the angles by which `x` [B, Hkv, T, D] are turned, None where the codec does not ask."""
    check_angles(angles, tables, x.shape[0], x.shape[2])
    return angles if tables.rotary is not None else None
