"""HIGGS (Malinovskii et al., NAACL 2025, arXiv 2411.17525), as AQUA-KV (Shutova et al., ICML 2025, arXiv 2501.19392) uses it.

- the channels of all heads of a token stand side by side in groups; every group is turned by a Hadamard transform with random
  signs and divided by its root mean square, which is kept in half precision; the relative error of every group is then that
  of a normal variable, which the paper shows to be what counts
- pairs of channels take the nearest of n points that are optimal for a normal vector: n = 16, 64 and 256 for 2, 3 and 4 bits
- groups are the largest power of two that divides a token of all heads, at most 1024 (AQUA-KV: 1024; the authors fill up
  narrower tokens with zeros, here the group is smaller instead)
- keys before rotary embedding, and the first four tokens exact, as AQUA-KV has them; its window of 128 recent tokens is left
  out

Ours: the points come from k-means on a normal sample instead of the authors' files of CLVQ grids (same optimum, same error).
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.levels import from_token_rows, group_channels, token_rows
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples
from pqkv_cli.baselines.transforms import hadamard, normal_codebook, turn
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.dispatch import nearest_centroids
from pqkv_kernels.format.layout import RotaryLayout

GROUP_SIZE = 1024
PAIR = 2
NORM_BITS = 16
SINKS = ExactTokens(num_sinks=4)


class NormalGrid:
    """Rows of channels in groups, each turned, scaled, and coded pair by pair; knows no cache.

    Parameters
    ----------
    nbits
        Bits per channel of the codes.
    width
        Channels of a row, C.
    group_size
        Channels of a group, a power of two that divides `width`.
    seed
        Of the signs, which are not stored.
    """

    def __init__(self, nbits: int, width: int, group_size: int, seed: int) -> None:
        self.code_bits, self.bits_per_channel = PAIR * nbits, nbits + NORM_BITS / group_size
        self._matrix = hadamard(group_size)
        self._signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        self._points = normal_codebook(PAIR, 1 << self.code_bits)

    def encode(self, rows: torch.Tensor) -> Payload:
        """Code `rows` [..., C] fp32."""
        groups = turn(rows * self._signs.to(rows.device), self._matrix).unflatten(-1, (-1, len(self._matrix)))
        scale = groups.square().mean(-1).sqrt().half()
        pairs = groups / scale.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
        flat = pairs.reshape(1, -1, PAIR)
        codes = nearest_centroids(flat, self._points.to(rows.device)[None])
        return Payload(codes.to(torch.uint8).view(*groups.shape[:-1], -1), self.code_bits, (scale,))

    def decode(self, payload: Payload) -> torch.Tensor:
        """Return the rows [..., C] fp32."""
        device = payload.codes.device
        groups = self._points.to(device)[payload.codes.long()].flatten(-2) * payload.scales[0].float()[..., None]
        return turn(groups.flatten(-2), self._matrix) * self._signs.to(device)


class GridCodec(RivalCodec):
    """Tokens of all heads as rows of a `NormalGrid`."""

    def __init__(self, grid: NormalGrid, rotary: RotaryLayout | None) -> None:
        super().__init__(Grouping("token"), SINKS, rotary, grid.bits_per_channel)
        self._grid = grid

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        return self._grid.encode(token_rows(x))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        return from_token_rows(self._grid.decode(payload), shape)


class Higgs:
    """HIGGS at an integer rate."""

    name = "higgs"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded before rotary embedding."""
        return "pre_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes and the seed matter."""
        codecs: list[RivalCodec] = []
        for layer in layers:
            grid = grid_of(self.name, self.nbits, layer, seed)
            codecs.append(GridCodec(grid, layer.rotary if side == "keys" else None))
        return codecs


def grid_of(name: str, nbits: int, layer: Samples, seed: int) -> NormalGrid:
    """Return the grid for the tokens of all heads of `layer`.

    Raises
    ------
    UnsupportedModelError
        If the groups would be too small to be worth their scale.
    """
    num_heads, _, dim = layer.vectors.shape
    return NormalGrid(nbits, num_heads * dim, group_channels(name, GROUP_SIZE, num_heads, dim), seed)
