"""Rotary embedding done and undone, and the angles by which coded keys were rotated. No codes.

Angles are per pair: `cos` and `sin` [..., rotary_dim / 2], of unit modulus.
"""

from dataclasses import dataclass

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS, RotaryLayout


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Rotate every rotary pair of `x` [..., D] by its angle; `cos`/`sin` broadcast against ``x[..., :rotary_dim / 2]``."""
    rotated, passed = x[..., : layout.rotary_dim], x[..., layout.rotary_dim :]
    if layout.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(halves, dim=-1).flatten(-2) if layout.interleaved else torch.cat(halves, dim=-1)
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


Angles = tuple[torch.Tensor, torch.Tensor]
"""``(cos, sin)`` per pair, e.g. [B, T, rotary_dim / 2] fp32, of unit modulus."""


@dataclass(frozen=True, slots=True)
class PageAngles:
    """Angles of pages whose tokens stand at consecutive positions.

    Token `j` of page `p` is rotated by ``base[p] + step[j]``: the base rotates the query once per page, and what is left is one
    constant table for every page, row and head.

    Attributes
    ----------
    base
        ``(cos, sin)`` at the first slot of every page, each [B, P, rotary_dim / 2] fp32.
    step
        ``(cos, sin)`` of the positions 0..63, each [64, rotary_dim / 2] fp32.

    Raises
    ------
    KernelError
        If the shapes do not fit each other.
    """

    base: Angles
    step: Angles

    def __post_init__(self) -> None:
        found = [list(t.shape) for t in (*self.base, *self.step)]
        pairs = self.step[0].shape[-1]
        if self.base[0].ndim != 3 or found != [list(self.base[0].shape[:2]) + [pairs]] * 2 + [[PAGE_TOKENS, pairs]] * 2:
            raise KernelError(f"angles have shapes {found}; expected twice [B, P, R / 2] and twice [{PAGE_TOKENS}, R / 2]")

    @property
    def num_pages(self) -> int:
        """Pages covered."""
        return int(self.base[0].shape[1])

    def pages(self, start: int, stop: int) -> "PageAngles":
        """Return the angles of the pages ``start:stop``."""
        return PageAngles((self.base[0][:, start:stop], self.base[1][:, start:stop]), self.step)

    def tokens(self) -> Angles:
        """Return ``(cos, sin)`` of every token, each [B, 64 * P, rotary_dim / 2]."""
        (base_cos, base_sin), (cos, sin) = ((t[:, :, None] for t in self.base), self.step)
        both = base_cos * cos - base_sin * sin, base_sin * cos + base_cos * sin
        return both[0].flatten(1, 2), both[1].flatten(1, 2)


def token_angles(angles: Angles | PageAngles | None) -> Angles | None:
    """Return `angles` per token."""
    return angles.tokens() if isinstance(angles, PageAngles) else angles


def page_range(angles: Angles | PageAngles | None, start: int, stop: int) -> Angles | PageAngles | None:
    """Return the part of `angles` that belongs to the pages ``start:stop``."""
    if angles is None or isinstance(angles, PageAngles):
        return None if angles is None else angles.pages(start, stop)
    tokens = slice(start * PAGE_TOKENS, stop * PAGE_TOKENS)
    return angles[0][:, tokens], angles[1][:, tokens]
