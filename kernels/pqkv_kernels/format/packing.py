"""Codes to bytes and back: the only definition of the bit layout (see `pqkv_kernels.format.layout`)."""

from functools import lru_cache

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS, SUPPORTED_NBITS, code_parts


def pack_codes(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack `codes` [..., 64] (any integer dtype) into [..., 8 * nbits] uint8.

    Raises
    ------
    KernelError
        If `nbits` is unsupported, the last dimension is not a page, or a code does not fit.
    """
    _check(nbits, codes.shape[-1], PAGE_TOKENS, "tokens")
    if codes.numel() and not bool(((codes >= 0) & (codes < 1 << nbits)).all()):
        found = f"{int(codes.min())}..{int(codes.max())}"
        raise KernelError(f"codes range over {found}; expected 0..{(1 << nbits) - 1} for nbits {nbits}")
    return pack_known(codes, nbits)


def pack_known(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack as `pack_codes` does, without looking at the codes, which would make a GPU wait."""
    packed = []
    for width, low in code_parts(nbits):
        part = ((codes >> low) & ((1 << width) - 1)).to(torch.uint8).unflatten(-1, (8 * width, 8 // width))
        byte = part[..., 0]
        for j in range(1, 8 // width):
            byte = byte | (part[..., j] << (width * j))
        packed.append(byte)
    return torch.cat(packed, dim=-1)


def unpack_codes(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """Return the [..., 64] int32 codes of `packed` [..., 8 * nbits] uint8.

    Raises
    ------
    KernelError
        If `nbits` is unsupported or the last dimension does not hold a page.
    """
    codes = torch.empty(*packed.shape[:-1], PAGE_TOKENS, dtype=torch.int32, device=packed.device)
    unpack_into(codes, packed, nbits)
    return codes


def unpack_into(codes: torch.Tensor, packed: torch.Tensor, nbits: int) -> None:
    """Write what `unpack_codes` returns to `codes` [..., 64] int32, which may be any view.

    Raises
    ------
    KernelError
        As `unpack_codes`.
    """
    _check(nbits, packed.shape[-1], PAGE_TOKENS * nbits // 8, "bytes")
    start = 0
    for width, low in code_parts(nbits):
        part = packed[..., start : start + 8 * width]
        start += 8 * width
        if width == 8:
            codes.copy_(part)
            continue
        # All codes of a byte come from one look-up: far cheaper than shifting a page once per place in the byte.
        entries = _byte_table(width, low, packed.device).index_select(0, part.to(torch.int32).flatten())
        bits = entries.view(torch.int32).view(codes.shape)
        if low:
            codes += bits
        else:
            codes.copy_(bits)


@lru_cache
def _byte_table(width: int, low: int, device: torch.device) -> torch.Tensor:
    """Return for every byte its ``8 / width`` values, shifted up by `low`, as the bytes of one number or of a row of two."""
    values = (torch.arange(256)[:, None] >> torch.arange(0, 8, width)) & ((1 << width) - 1)
    table = (values << low).to(torch.int32).contiguous().to(device)
    return table.view(torch.int64 if width == 4 else torch.complex128).squeeze(-1)


def _check(nbits: int, found: int, expected: int, what: str) -> None:
    if nbits not in SUPPORTED_NBITS:
        raise KernelError(f"nbits is {nbits}; expected one of {', '.join(map(str, SUPPORTED_NBITS))}")
    if found != expected:
        raise KernelError(f"the last dimension holds {found} {what}; expected {expected} (one page at nbits {nbits})")
