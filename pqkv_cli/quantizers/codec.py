"""What every vector quantizer in a simulated cache looks like, ours and the baselines'. Knows no cache and no model."""

from typing import Protocol

import torch

from pqkv_kernels.dispatch import round_trip
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.tables import CodecTables


class VectorCodec(Protocol):
    """Quantizes the keys or the values of one layer.

    Attributes
    ----------
    rotary
        Set where the codec works on keys before rotary embedding: the cache then un-rotates and re-rotates around it.
    bits_per_channel
        Bits of code per channel, everything stored per token counted.
    """

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        ...

    @property
    def bits_per_channel(self) -> float:
        """Stored bits per channel and token."""
        ...

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return what vectors [B, Hkv, T, D] become when stored and read back, fp32, in the same space."""
        ...


class ProductCodec:
    """Product quantization by fitted tables."""

    def __init__(self, tables: CodecTables) -> None:
        self._tables = tables

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        return self._tables.rotary

    @property
    def bits_per_channel(self) -> float:
        """Bits of code per channel."""
        return self._tables.layout.bits_per_channel

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the decoded codes of `x` [B, Hkv, T, D], fp32."""
        self._tables = self._tables.to(x.device)
        return round_trip(x, self._tables, rotated=False)
