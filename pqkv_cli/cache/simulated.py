"""The cache of mode `all`: every key and value of every token is quantized before anyone attends to it.

`SimulatedLayer.update` encodes at once and hands back decoded tensors, so it works under any attention function and with any
codec. It measures quality, not memory: what it holds is dense.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicLayer

from pqkv_cli.cache.cache import AngleSources, PositionedCache, with_layers
from pqkv_cli.cache.checks import check_gradients
from pqkv_cli.cache.positions import SlotPositions
from pqkv_cli.hf.cache_layers import CacheLayerMixin
from pqkv_cli.models.rotary import AngleSource
from pqkv_cli.quantizers.codec import PredictedCodec, VectorCodec
from pqkv_cli.specs import Side
from pqkv_kernels.format.rotary import rotate, unrotate


def simulated_cache(
    config: Any, codecs: Sequence[dict[Side, VectorCodec] | None], angle_sources: AngleSources
) -> PositionedCache:
    """Return an empty cache of mode `all`.

    Raises
    ------
    CacheError
        As `with_layers`.
    """
    slots = SlotPositions()

    def make(index: int) -> CacheLayerMixin | None:
        layer_codecs = codecs[index]
        return None if layer_codecs is None else SimulatedLayer(layer_codecs, slots, angle_sources[index])

    return PositionedCache(with_layers(config, len(codecs), make), slots)


class SimulatedLayer(DynamicLayer):
    """A dense layer whose content has passed through the codecs."""

    def __init__(self, codecs: dict[Side, VectorCodec], slots: SlotPositions, angle_source: AngleSource | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.codecs, self.slots, self.angle_source = codecs, slots, angle_source

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize keys (after rotary embedding) and values [B, Hkv, T, D] and return all decoded ones.

        Raises
        ------
        CacheError
            If gradients are asked for that the codecs do not pass on.
        """
        start = self.get_seq_length()
        keys, plain = self._quantized_keys(key_states, start)
        values = self._quantized_values(value_states, plain)
        pairs = ((key_states, keys), (value_states, values))
        check_gradients(*(given for given, decoded in pairs if not decoded.requires_grad))
        joined: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values)
        return joined

    def _quantized_values(self, values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return decoded values; `keys` are the decoded ones, as they are coded."""
        codec = self.codecs["values"]
        if isinstance(codec, PredictedCodec):
            return codec.encode_decode_with(values, keys, self.codecs["keys"]).to(values.dtype)
        return codec.encode_decode(values).to(values.dtype)

    def _quantized_keys(self, keys: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return decoded keys after and before rotary embedding; both alike where they are coded after it."""
        codec = self.codecs["keys"]
        if codec.rotary is None:
            decoded = codec.encode_decode(keys)
            return decoded.to(keys.dtype), decoded
        angles = self.slots.angles(self.angle_source, start, start + keys.shape[2])
        assert angles is not None  # a codec before rotary embedding comes with an angle source
        cos, sin = angles[0][:, None], angles[1][:, None]
        plain = codec.encode_decode(unrotate(keys.float(), cos, sin, codec.rotary))
        return rotate(plain, cos, sin, codec.rotary).to(keys.dtype), plain
