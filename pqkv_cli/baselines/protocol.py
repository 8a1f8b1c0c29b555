"""What every method we compare with looks like: fit, round trip, and the bits of what it stores. Knows no method, no model.

Rivals run in mode ``all``: one call sees the whole sequence. Sinks a method keeps are kept and counted; a window of recent
tokens moves with the query, which one call cannot show, so it is zero unless asked for, and then lies at the end. A
codec decodes from nothing else than what it has stored, so a bit that is used is a bit that is paid for.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.format.layout import RotaryLayout

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


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which tokens of a row are coded together: one (`token`), `num_tokens` in a row (`token_block`), or all (`sequence`)."""

    kind: Literal["token", "token_block", "sequence"]
    num_tokens: int = 1


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """Tokens a method leaves in half precision: the first ones of a row and the most recent ones."""

    num_sinks: int = 0
    window_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """One layer's keys or values as a rival calibrates on them.

    Attributes
    ----------
    vectors
        [Hkv, N, D] fp32, keys in the space that the rival declared.
    token_weight
        [Hkv, N] fp32, squared attention each token received.
    channel_weight
        [Hkv, D] fp32, mean square of what a channel's error is multiplied with: queries, or output projections.
    rotary
        The layer's rotary pairs where `vectors` are keys before rotary embedding, else None.
    """

    vectors: torch.Tensor
    token_weight: torch.Tensor
    channel_weight: torch.Tensor
    rotary: RotaryLayout | None = None


class RivalCodec(ABC):
    """Quantizes the keys or the values of one layer. A `VectorCodec` that also says what it stores.

    Attributes
    ----------
    rotary
        Set where keys are coded before rotary embedding.
    grouping, exact
        As declared by the method.
    bits_per_channel
        Codes, scales and expected outliers of a quantized token; without exact tokens.
    table_bytes
        Bytes of what is stored once: codebooks, offline scales, rotations that no seed gives back.
    """

    def __init__(
        self,
        grouping: Grouping,
        exact: ExactTokens,
        rotary: RotaryLayout | None,
        bits_per_channel: float,
        table_bytes: int = 0,
    ) -> None:
        self.grouping, self.exact, self.rotary = grouping, exact, rotary
        self.bits_per_channel, self.table_bytes = bits_per_channel, table_bytes

    def encode(self, x: torch.Tensor) -> Stored:
        """Return what is kept of `x` [B, Hkv, T, D]; tokens that fill no whole block stay exact."""
        batch, heads, tokens, dim = x.shape
        block = self.grouping.num_tokens if self.grouping.kind == "token_block" else 1
        start = min(self.exact.num_sinks, tokens)
        stop = start + max(0, tokens - start - self.exact.window_tokens) // block * block
        exact = torch.cat((x[:, :, :start], x[:, :, stop:]), dim=2).to(EXACT_DTYPE)
        payload = self.quantize(x[:, :, start:stop].float()) if stop > start else None
        return Stored((batch, heads, tokens, dim), start, exact, payload)

    def decode(self, stored: Stored) -> torch.Tensor:
        """Return the vectors [B, Hkv, T, D] fp32 that `stored` stands for."""
        exact = stored.exact.float()
        if stored.payload is None:
            return exact
        batch, heads, _, dim = stored.shape
        coded = self.dequantize(stored.payload, (batch, heads, stored.num_quantized, dim))
        return torch.cat((exact[:, :, : stored.start], coded, exact[:, :, stored.start :]), dim=2)

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `x` [B, Hkv, T, D] becomes when stored and read back, fp32."""
        return self.decode(self.encode(x))

    @abstractmethod
    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D] fp32, whole blocks of them."""

    @abstractmethod
    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors of `payload`, of `shape`, fp32."""


class Rival(Protocol):
    """A method at one rate."""

    @property
    def name(self) -> str:
        """Name of the method, without its rate."""
        ...

    @property
    def nbits(self) -> int:
        """Native rate: bits of code per channel."""
        ...

    def space(self, side: Side) -> KeySpace:
        """Return where keys are coded; layers without rotary embedding, and values, are the same in both."""
        ...

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer.

        Raises
        ------
        UnsupportedModelError
            If the method does not exist for these shapes.
        DataError
            If there are too few samples.
        """
        ...


def unsupported(name: str, found: str, expected: str) -> UnsupportedModelError:
    """Return the error of a method that does not exist for a model's shapes."""
    return UnsupportedModelError(f"{name}: found {found}; expected {expected}; leave {name} out of --peers for this model")
