"""A product codec that can be watched: what it was given, what it made of it, and what that matters. Knows no model.

Codes are chosen as always; gradients take the decoded vector for the vector itself (straight-through, Bengio et al. 2013), so
that what later layers make of an error reaches the layers before.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from pqkv_kernels.codec import from_code_space, to_code_space
from pqkv_kernels.layout import RotaryLayout
from pqkv_kernels.quantize import dequantize, quantize
from pqkv_kernels.tables import CodecTables

Mode = Literal["coded", "exact", "traced"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One call of a codec.

    Attributes
    ----------
    codes
        As `quantize` returns them: [B, Hkv, M, T] int64 of every group in storage order.
    decoded
        What they stand for in code space, [B, Hkv, T, D] fp32.
    shift
        Zeros of that shape that were added to the decoded vectors; their gradient is that of the vectors.
    """

    codes: list[torch.Tensor]
    decoded: torch.Tensor
    shift: torch.Tensor


class WatchedCodec:
    """Product quantization by `tables`, which may be replaced.

    In the mode ``exact`` it leaves vectors as they are and keeps them, in code space, as `exact`; in the mode ``traced`` it
    keeps its last call as `trace`.
    """

    def __init__(self, tables: CodecTables) -> None:
        self.tables = tables
        self.mode: Mode = "coded"
        self.exact: torch.Tensor | None = None
        self.trace: Trace | None = None
        self.forget_errors()

    def forget_errors(self) -> None:
        """Begin to measure the relative error anew."""
        self._squares = torch.zeros(2, self.tables.num_heads, dtype=torch.float64)

    @property
    def relative_error(self) -> tuple[float, ...]:
        """``||x - x'||^2 / ||x||^2`` in code space over all vectors since errors were last forgotten, per KV head."""
        error, energy = self._squares
        return tuple(torch.where(energy > 0, error / energy.clamp(min=torch.finfo(torch.float64).tiny), 0.0).tolist())

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        return self.tables.rotary

    @property
    def bits_per_channel(self) -> float:
        """Bits of code per channel."""
        return self.tables.layout.bits_per_channel

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the decoded codes of `x` [B, Hkv, T, D], fp32, or in the mode ``exact`` `x` itself."""
        self.tables = self.tables.to(x.device)
        layout, codebooks = self.tables.layout, self.tables.codebooks
        coded = to_code_space(x, self.tables, rotated=False)
        if self.mode == "exact":
            self.exact = coded.detach()
            return x.float()
        codes = quantize(coded.detach(), layout, codebooks)
        decoded = dequantize(codes, layout, codebooks)
        squares = torch.stack(((coded.detach() - decoded).square(), coded.detach().square()))
        self._squares += squares.sum(dim=(1, 3, 4), dtype=torch.float64).cpu()
        if self.mode == "traced":
            self.trace = Trace(codes, decoded, torch.zeros_like(decoded, requires_grad=True))
            decoded = coded + (decoded - coded.detach()) + self.trace.shift
        return from_code_space(decoded, self.tables, rotated=False)
