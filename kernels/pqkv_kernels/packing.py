"""Codes to bytes and back: the only definition of the bit layout (see `pqkv_kernels.layout`)."""

import math

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
    words = _words(packed, nbits)
    runs = [(words >> (i * nbits)) & ((1 << nbits) - 1) for i in range(64 // words.shape[-1])]
    return torch.stack([run.to(torch.int32) for run in runs], dim=-1).flatten(-2)


def _words(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """Return the shortest runs of codes that end on a byte boundary as integers [..., 64 / codes per run]."""
    num_bytes = nbits // math.gcd(nbits, 8)
    wide = torch.int32 if num_bytes <= 4 else torch.int64
    padded = packed.new_zeros(*packed.shape[:-1], packed.shape[-1] // num_bytes, wide.itemsize)
    padded[..., :num_bytes] = packed.unflatten(-1, (-1, num_bytes))
    return padded.view(wide)[..., 0]


def _check(nbits: int, found: int, expected: int, what: str) -> None:
    if nbits not in SUPPORTED_NBITS:
        raise KernelError(f"nbits is {nbits}; expected one of {', '.join(map(str, SUPPORTED_NBITS))}")
    if found != expected:
        raise KernelError(f"the last dimension holds {found} {what}; expected {expected} (one page at nbits {nbits})")
