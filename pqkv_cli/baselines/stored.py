"""What a rival keeps of a piece of cache, and how many bits that is. Knows tensors; no method.

A codec decodes from nothing else than what is counted here, so a bit that is used is a bit that is paid for.
"""

from dataclasses import dataclass

import torch

# Tokens that stay exact are held, and paid for, in half precision, as the papers do.
EXACT_DTYPE = torch.float16


@dataclass(frozen=True, slots=True)
class StoredBits:
    """Bits by what they are spent on, over `num_channels` channels (batch x heads x tokens x head_dim)."""

    codes: int = 0
    scales: int = 0
    outliers: int = 0
    exact_tokens: int = 0
    num_channels: int = 0

    def __add__(self, other: "StoredBits") -> "StoredBits":
        """Return the sum of both."""
        return StoredBits(
            self.codes + other.codes,
            self.scales + other.scales,
            self.outliers + other.outliers,
            self.exact_tokens + other.exact_tokens,
            self.num_channels + other.num_channels,
        )

    @property
    def per_channel(self) -> float:
        """All bits per channel and token."""
        return (self.codes + self.scales + self.outliers + self.exact_tokens) / max(1, self.num_channels)


@dataclass(frozen=True, slots=True)
class Payload:
    """The quantized tokens.

    Attributes
    ----------
    codes
        Integers, `nbits` each when packed.
    scales
        Scales, zero points, norms; each counts with the size of its dtype.
    outliers
        Values and places of what stays exact inside a token; counted likewise.
    handle
        For backends that decode their own objects: the object whose tensors are listed above.
    """

    codes: torch.Tensor
    nbits: int
    scales: tuple[torch.Tensor, ...] = ()
    outliers: tuple[torch.Tensor, ...] = ()
    handle: object = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece of cache [B, Hkv, T, D]: `start` exact tokens, then the quantized ones, then exact ones again.

    `exact` is [B, Hkv, n, D] in half precision; `payload` is None where no token is quantized.
    """

    shape: tuple[int, int, int, int]
    start: int
    exact: torch.Tensor
    payload: Payload | None

    @property
    def num_quantized(self) -> int:
        """Quantized tokens per row."""
        return self.shape[2] - self.exact.shape[2]

    @property
    def bits(self) -> StoredBits:
        """What all of it takes."""
        batch, heads, tokens, dim = self.shape
        exact, channels = tensor_bits(self.exact), batch * heads * tokens * dim
        if self.payload is None:
            return StoredBits(exact_tokens=exact, num_channels=channels)
        return StoredBits(
            codes=self.payload.codes.numel() * self.payload.nbits,
            scales=sum(map(tensor_bits, self.payload.scales)),
            outliers=sum(map(tensor_bits, self.payload.outliers)),
            exact_tokens=exact,
            num_channels=channels,
        )


def tensor_bits(tensor: torch.Tensor) -> int:
    """Return the bits of `tensor` as it lies in memory."""
    return tensor.numel() * tensor.element_size() * 8
