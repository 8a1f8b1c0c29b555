"""What every vector quantizer in a simulated cache looks like, ours and the baselines'. Knows no cache and no model."""

from typing import Protocol, runtime_checkable

import torch

from pqkv_cli.errors import UsageError
from pqkv_kernels.dispatch import quantize, round_trip, to_code_space
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import dequantize, from_code_space
from pqkv_kernels.reference.prediction import predicted


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
    """Product quantization by fitted `tables`."""

    def __init__(self, tables: CodecTables) -> None:
        self.tables = tables

    @property
    def rotary(self) -> RotaryLayout | None:
        """Rotary layout of keys coded before rotary embedding, else None."""
        return self.tables.rotary

    @property
    def bits_per_channel(self) -> float:
        """Bits of code per channel."""
        return self.tables.layout.bits_per_channel

    def encode_decode(self, x: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Return the decoded codes of `x` [B, Hkv, T, D], fp32.

        Parameters
        ----------
        known
            What is known of `x` in code space, [B, Hkv, T, D] fp32, and is not coded (`known_of_values`); needed where the
            tables predict.

        Raises
        ------
        UsageError
            If it is needed and missing: what would be coded is not what the tables were fitted to.
        """
        self.tables = self.tables.to(x.device)
        if known is None:
            check_known(self.tables)
            return round_trip(x, self.tables, rotated=False)
        coded = to_code_space(x, self.tables, rotated=False) - known
        layout, codebooks = self.tables.layout, self.tables.codebooks
        decoded = known + dequantize(quantize(coded, layout, codebooks), layout, codebooks)
        return from_code_space(decoded, self.tables, rotated=False)

    def encode_decode_with(self, x: torch.Tensor, keys: torch.Tensor, key_codec: VectorCodec) -> torch.Tensor:
        """Return decoded values as `PredictedCodec` says."""
        if self.tables.prediction is None:
            return self.encode_decode(x)
        assert isinstance(key_codec, ProductCodec)  # tables that predict values come with those of their keys
        return self.encode_decode(x, known_of_values(keys, key_codec.tables, self.tables))


@runtime_checkable
class PredictedCodec(Protocol):
    """A codec of values that may take from the keys of the same tokens what these say of them."""

    def encode_decode_with(self, x: torch.Tensor, keys: torch.Tensor, key_codec: VectorCodec) -> torch.Tensor:
        """Return what values `x` become beside decoded `keys`, which `key_codec` decoded, all [B, Hkv, T, D].

        Keys are as their codec takes them: before rotary embedding where it works there.
        """
        ...


def known_of_values(keys: torch.Tensor, key_tables: CodecTables, value_tables: CodecTables) -> torch.Tensor:
    """Return what decoded `keys` [B, Hkv, T, D], as they are coded, say of their values: [B, Hkv, T, D] fp32 in code space."""
    coded = to_code_space(keys, key_tables.to(keys.device), rotated=False)
    return predicted(coded, value_tables.to(keys.device))


def check_known(tables: CodecTables) -> None:
    """Refuse to code values without what is known of them, where `tables` say that something is.

    Raises
    ------
    UsageError
        Then.
    """
    if tables.prediction is not None:
        raise UsageError(
            "these values are predicted from their keys, and were given without them; expected both sides of a layer together: "
            "use them in a cache, or fit the values without codebooks.predict_values"
        )
