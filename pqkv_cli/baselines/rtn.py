"""Round to nearest per token, and KIVI (keys per channel): uniform levels without calibration."""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.levels import (
    PARAMETER_BITS,
    dequantize_groups,
    from_token_rows,
    group_channels,
    quantize_groups,
    token_rows,
)
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples
from pqkv_cli.specs import KeySpace, Side


class PerToken(RivalCodec):
    """Groups of channels of one token share scale and zero point; `group_size` channels each, across heads if need be."""

    def __init__(self, nbits: int, group_size: int, exact: ExactTokens) -> None:
        super().__init__(Grouping("token"), exact, None, nbits + PARAMETER_BITS / group_size)
        self._nbits, self._group_size = nbits, group_size

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        return quantize_groups(token_rows(x).unflatten(-1, (-1, self._group_size)), self._nbits)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        return from_token_rows(dequantize_groups(payload).flatten(-2), shape)


class RoundToNearest:
    """Per-token asymmetric round to nearest with groups of at most `group_size` channels."""

    def __init__(self, nbits: int, group_size: int = 64, name: str = "rtn") -> None:
        self.name, self.nbits, self._group_size = name, nbits, group_size

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes matter."""
        codecs: list[RivalCodec] = []
        for layer in layers:
            num_heads, _, dim = layer.vectors.shape
            size = group_channels(self.name, self._group_size, num_heads, dim)
            codecs.append(PerToken(self.nbits, size, ExactTokens()))
        return codecs


GROUP_SIZE = 32


class PerChannel(RivalCodec):
    """The entries of one channel over `group_size` tokens share scale and zero point."""

    def __init__(self, nbits: int, group_size: int, exact: ExactTokens) -> None:
        super().__init__(Grouping("token_block", group_size), exact, None, nbits + PARAMETER_BITS / group_size)
        self._nbits, self._group_size = nbits, group_size

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]; T is a multiple of the group size."""
        return quantize_groups(x.unflatten(2, (-1, self._group_size)).transpose(-1, -2), self._nbits)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        return dequantize_groups(payload).transpose(-1, -2).flatten(2, 3)


class Kivi:
    """KIVI with groups of `group_size` and, where asked for, a residual window."""

    def __init__(self, nbits: int, group_size: int = GROUP_SIZE, window_tokens: int = 0, name: str = "kivi") -> None:
        self.name, self.nbits = name, nbits
        self._group_size, self._exact = group_size, ExactTokens(window_tokens=window_tokens)

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes matter."""
        if side == "keys":
            return [PerChannel(self.nbits, self._group_size, self._exact) for _ in layers]
        codecs: list[RivalCodec] = []
        for layer in layers:
            num_heads, _, dim = layer.vectors.shape
            size = group_channels(self.name, self._group_size, num_heads, dim)
            codecs.append(PerToken(self.nbits, size, self._exact))
        return codecs
