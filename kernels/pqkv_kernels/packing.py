"""Codes to bytes and back: the only definition of the bit layout (see `pqkv_kernels.layout`)."""

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS, SUPPORTED_NBITS


def pack_codes(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack `codes` [..., 64] (any integer dtype) into [..., 8 * nbits] uint8, little-endian along tokens.

    Raises
    ------
    KernelError
        If `nbits` is unsupported, the last dimension is not a page, or a code does not fit.
    """
    _check(nbits, codes.shape[-1], PAGE_TOKENS, "tokens")
    if codes.numel() and not bool(((codes >= 0) & (codes < 1 << nbits)).all()):
        found = f"{int(codes.min())}..{int(codes.max())}"
        raise KernelError(f"codes range over {found}; expected 0..{(1 << nbits) - 1} for nbits {nbits}")
    if nbits == 8:
        return codes.to(torch.uint8)
    bits = (codes.to(torch.int32)[..., None] >> torch.arange(nbits, dtype=torch.int32, device=codes.device)) & 1
    octets = bits.flatten(-2).unflatten(-1, (8 * nbits, 8))
    weights = 1 << torch.arange(8, dtype=torch.int32, device=codes.device)
    packed: torch.Tensor = (octets * weights).sum(-1).to(torch.uint8)
    return packed


def unpack_codes(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """Return the [..., 64] int32 codes of `packed` [..., 8 * nbits] uint8.

    Raises
    ------
    KernelError
        If `nbits` is unsupported or the last dimension does not hold a page.
    """
    _check(nbits, packed.shape[-1], PAGE_TOKENS * nbits // 8, "bytes")
    if nbits == 8:
        return packed.to(torch.int32)
    if nbits in (1, 2, 4):  # codes do not cross bytes
        shifts = torch.arange(0, 8, nbits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & ((1 << nbits) - 1)).flatten(-2).to(torch.int32)
    # 8 codes fill exactly nbits bytes, so the page is 8 such blocks, each a window of shifted bytes.
    blocks = packed.to(torch.int32).unflatten(-1, (8, nbits))
    start = torch.arange(8, device=packed.device) * nbits
    byte = start // 8
    reach = [blocks[..., (byte + k).clamp(max=nbits - 1)] << (8 * k) for k in range(3)]
    codes: torch.Tensor = ((reach[0] | reach[1] | reach[2]) >> (start % 8).to(torch.int32)) & ((1 << nbits) - 1)
    return codes.flatten(-2)


def _check(nbits: int, found: int, expected: int, what: str) -> None:
    if nbits not in SUPPORTED_NBITS:
        raise KernelError(f"nbits is {nbits}; expected one of {', '.join(map(str, SUPPORTED_NBITS))}")
    if found != expected:
        raise KernelError(f"the last dimension holds {found} {what}; expected {expected} (one page at nbits {nbits})")
