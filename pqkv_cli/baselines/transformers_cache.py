"""The quantizers of transformers' own ``QuantizedCache``, quanto and HQQ, as they are. Knows that library's cache layers.

Keys after rotary embedding and values with the library's defaults (groups of 64 entries along axis 0, min/max ranges for
quanto, half-quadratic ones for HQQ). Its residual window of 128 tokens is left out in mode ``all``. Both need their packages:
``pip install 'pqkv[quantized-cache]'``.
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples, unsupported
from pqkv_cli.errors import PqkvError
from pqkv_cli.hf.cache_layers import Backend, LayerQuantizer
from pqkv_cli.specs import KeySpace, Side

GROUP_SIZE = 64


class LibraryCodec(RivalCodec):
    """One cache layer of transformers, used for its quantizer alone."""

    def __init__(self, backend: Backend, nbits: int) -> None:
        # Half precision: what the library would be given by a model in use; scales are stored in the dtype of the cache.
        super().__init__(Grouping("sequence"), ExactTokens(), None, nbits + 32 / GROUP_SIZE)
        self._backend, self._quantizer = backend, LayerQuantizer(backend, nbits, GROUP_SIZE)

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D], together."""
        if x.numel() % GROUP_SIZE:
            raise unsupported(self._backend, f"{x.numel()} entries at once", f"a multiple of {GROUP_SIZE}; change --context")
        held = self._quantizer.quantize(x.half().contiguous())
        codes, scales = self._quantizer.tensors(held)
        return Payload(codes, 8 * codes.element_size(), scales, handle=held)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        return self._quantizer.dequantize(payload.handle).float().reshape(shape)


class LibraryCache:
    """transformers' ``QuantizedCache`` with one of its backends."""

    def __init__(self, nbits: int, backend: Backend) -> None:
        self.name, self.nbits, self._backend = str(backend), nbits, backend

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer.

        Raises
        ------
        PqkvError
            If the backend's package is not installed.
        """
        try:
            return [LibraryCodec(self._backend, self.nbits) for _ in layers]
        except ImportError as error:
            raise PqkvError(
                f"{self.name}: found no package for this backend of transformers' QuantizedCache; expected "
                f"{'optimum-quanto' if self._backend == 'quanto' else 'hqq'}; run: pip install 'pqkv[quantized-cache]'"
            ) from error
