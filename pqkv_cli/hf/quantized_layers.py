"""The quantizers inside the layers of transformers' own ``QuantizedCache``: they are private there, and used alone here."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import HQQQuantizedLayer, QuantoQuantizedLayer

Backend = Literal["quanto", "hqq"]
_LAYERS: Mapping[Backend, Any] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}


class LayerQuantizer:
    """The quantizer of one backend.

    Raises
    ------
    ImportError
        If the backend's package is not installed.
    """

    def __init__(self, backend: Backend, nbits: int, group_size: int) -> None:
        self._backend, self._layer = backend, _LAYERS[backend](nbits=nbits, q_group_size=group_size)

    def quantize(self, x: torch.Tensor) -> Any:
        """Return what the backend makes of `x` [B, Hkv, T, D], in a form that only it understands."""
        self._layer.keys = x[..., :0, :]  # it looks for its dtype there
        return self._layer._quantize(x, axis=0)

    def dequantize(self, held: Any) -> torch.Tensor:
        """Return the vectors that `held` stands for."""
        decoded: torch.Tensor = self._layer._dequantize(held)
        return decoded

    def tensors(self, held: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the packed codes, and scales and zero points, of what `quantize` made."""
        if self._backend == "quanto":
            return held._data._data, (held._scale, held._shift)
        packed, meta = held
        return packed, (meta["scale"], meta["zero"])
