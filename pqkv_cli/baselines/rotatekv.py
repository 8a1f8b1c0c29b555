"""RotateKV (Su et al., IJCAI 2025, arXiv 2501.16383): rotate outliers away, then round per token.

- keys before rotary embedding: heads in groups of four go through one Walsh-Hadamard transform, which spreads outlier
  channels over all of them; then the channels of all heads are put in order of their calibrated means, so that a
  quantization group holds channels of one kind (section 4.1 and 4.2, the order of steps of the authors' code)
- values: a Walsh-Hadamard transform per head
- both: asymmetric rounding per token in groups of 128 channels; at 2 bits ranges are clipped to 0.8 of themselves
- attention sinks stay exact (section 4.3). The authors find up to 20 of 4096 tokens by the massive activations of hidden
  states; a cache sees no hidden states, so the first tokens stand for them, in that proportion at the contexts used here
"""

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
from pqkv_cli.baselines.transforms import check_power_of_two, hadamard, turn
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.format.layout import RotaryLayout

HEADS_PER_ROTATION = 4
GROUP_SIZE = 128
CLIP_AT_TWO_BITS = 0.8
SINKS = ExactTokens(num_sinks=4)


class RotatedPerToken(RivalCodec):
    """Tokens are turned block by block, their channels put in `order` [Hkv * D], and rounded in groups.

    Parameters
    ----------
    block
        Channels of one Walsh-Hadamard transform: of several heads, or of one.
    """

    def __init__(self, nbits: int, block: int, order: torch.Tensor, group_size: int, rotary: RotaryLayout | None) -> None:
        super().__init__(Grouping("token"), SINKS, rotary, nbits + PARAMETER_BITS / group_size, 2 * order.numel())
        self._nbits, self._group_size, self._order = nbits, group_size, order
        self._matrix = hadamard(block)
        self._clip = CLIP_AT_TWO_BITS if nbits <= 2 else 1.0

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        rows = turn(token_rows(x), self._matrix)[..., self._order.to(x.device)]
        return quantize_groups(rows.unflatten(-1, (-1, self._group_size)), self._nbits, self._clip)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        ordered = dequantize_groups(payload).flatten(-2)
        rows = torch.empty_like(ordered)
        rows[..., self._order.to(rows.device)] = ordered
        return from_token_rows(turn(rows, self._matrix), shape)  # the transform is its own inverse


class RotateKV:
    """RotateKV at an integer rate."""

    name = "rotatekv"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded before rotary embedding."""
        return "pre_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer: keys need the order of their turned channels."""
        return [self._fit_layer(side, layer) for layer in layers]

    def _fit_layer(self, side: Side, layer: Samples) -> RivalCodec:
        num_heads, _, dim = layer.vectors.shape
        check_power_of_two(self.name, dim)
        group_size = group_channels(self.name, GROUP_SIZE, num_heads, dim)
        if side == "values":
            return RotatedPerToken(self.nbits, dim, torch.arange(num_heads * dim), group_size, None)
        block = dim * next(n for n in (HEADS_PER_ROTATION, 2, 1) if num_heads % n == 0)
        turned = turn(layer.vectors.transpose(0, 1).flatten(1), hadamard(block))
        order = turned.mean(0).argsort(stable=True)
        return RotatedPerToken(self.nbits, block, order, group_size, layer.rotary)
