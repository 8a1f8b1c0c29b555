"""Rotary embedding done and undone. Angles are per pair: `cos` and `sin` [..., rotary_dim / 2], of unit modulus."""

import torch

from pqkv_kernels.layout import RotaryLayout


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Turn every rotary pair of `x` [..., D] by its angle; `cos`/`sin` broadcast against ``x[..., :rotary_dim / 2]``."""
    rotated, passed = x[..., : layout.rotary_dim], x[..., layout.rotary_dim :]
    if layout.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if layout.interleaved else torch.cat(turned, dim=-1)
    return joined if passed.shape[-1] == 0 else torch.cat((joined, passed), dim=-1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Undo `rotate` with the same angles."""
    return rotate(x, cos, -sin, layout)


def unit_angles(cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per-pair fp32 angles of unit modulus from a model's `cos`, `sin` [..., rotary_dim].

    Models repeat the pairs' angles and may multiply them by an attention scaling (YaRN); that factor then stays in the keys.
    """
    cos, sin = cos[..., : layout.num_pairs].float(), sin[..., : layout.num_pairs].float()
    modulus = torch.hypot(cos, sin)
    return cos / modulus, sin / modulus
