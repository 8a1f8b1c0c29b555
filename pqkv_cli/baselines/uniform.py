"""Asymmetric uniform quantization of groups of channels, as several methods share it. Knows numbers and groups only."""

import math

import torch

from pqkv_cli.baselines.protocol import unsupported
from pqkv_cli.baselines.stored import Payload

# Below this many channels per group, scale and zero point cost more than the finest codes.
LEAST_GROUP = 8
PARAMETER_BITS = 32  # a half-precision scale and a half-precision zero point


def quantize_groups(groups: torch.Tensor, nbits: int, clip: float = 1.0) -> Payload:
    """Round `groups` [..., g] fp32 to ``2 ** nbits`` equally spaced levels between their smallest and largest entry.

    Scale and zero point are rounded to half precision first, as they are stored. `clip` shrinks both ends of the range.
    """
    low, high = groups.amin(-1) * clip, groups.amax(-1) * clip
    top = 2**nbits - 1
    zero, scale = low.half(), ((high - low) / top).half()
    steps = (groups - zero.float()[..., None]) / scale.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
    return Payload(steps.round().clamp(0, top).to(torch.uint8), nbits, (scale, zero))


def dequantize_groups(payload: Payload) -> torch.Tensor:
    """Return the groups [..., g] fp32 of `quantize_groups`."""
    scale, zero = payload.scales
    return payload.codes.float() * scale.float()[..., None] + zero.float()[..., None]


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the tokens of `x` [B, Hkv, T, D] with all heads side by side, [B, T, Hkv * D]."""
    return x.transpose(1, 2).flatten(2)


def from_token_rows(rows: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Undo `token_rows`."""
    batch, heads, tokens, dim = shape
    return rows.reshape(batch, tokens, heads, dim).transpose(1, 2)


def group_channels(name: str, group_size: int, num_heads: int, head_dim: int) -> int:
    """Return the channels of a group: the largest divisor of `group_size` that divides a token of all heads.

    Raises
    ------
    UnsupportedModelError
        If only groups too small to be worth their scale are left.
    """
    size = math.gcd(group_size, num_heads * head_dim)
    if size < LEAST_GROUP:
        raise unsupported(
            name,
            f"{num_heads} heads of {head_dim} channels, which leave groups of {size}",
            f"a token that divides into groups of at least {LEAST_GROUP} channels",
        )
    return size
