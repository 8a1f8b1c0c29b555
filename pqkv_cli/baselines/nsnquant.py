"""NSNQuant (Son et al., NeurIPS 2025, arXiv 2505.18231): normalize, shift, normalize. Needs no calibration.

Per head and block of 64 tokens: every token is divided by its root mean square s1, the mean o of each channel over
the block is taken out, and every token is divided by its root mean square s2 again; after a Hadamard transform what is left
is close to standard normal for any model and text. So one codebook serves everywhere, for 8 channels at a time:

- 2 bits: 8 signs and one of 256 points without signs
- 1 bit: one of 256 points

Decoded: ``s1 * (s2 * H z + o)``. Keys before rotary embedding. Tokens that fill no block stay exact, as in the paper.

What could not be checked against the paper, and how it is done here: s1, s2 and o are kept in 8 bits with a half-precision
range per block each (0.26 bits per channel at a head_dim of 128; the paper has 0.23); s2 is what fits the chosen points best;
the codebook is that of least squared error for a normal vector, by k-means alone, where the authors tune theirs further.
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.levels import PARAMETER_BITS, dequantize_groups, quantize_groups
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples, unsupported
from pqkv_cli.baselines.transforms import check_power_of_two, hadamard, magnitude_codebook, normal_codebook, turn
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.dispatch import nearest_centroids
from pqkv_kernels.format.layout import RotaryLayout

BLOCK_TOKENS = 64
CODE_CHANNELS = 8
CODE_BITS = 8
SIDE_BITS = 8  # of s1, s2 and o
SIGN_PLACES = torch.arange(CODE_CHANNELS)


class NormalizedTwice(RivalCodec):
    """Blocks of tokens of one head; `signed` says whether a code has its signs beside it (2 bits per channel) or not (1)."""

    def __init__(self, dim: int, signed: bool, rotary: RotaryLayout | None) -> None:
        ranges = PARAMETER_BITS * 3 / (BLOCK_TOKENS * dim)
        side_bits = SIDE_BITS * 2 / dim + SIDE_BITS / BLOCK_TOKENS + ranges
        super().__init__(Grouping("token_block", BLOCK_TOKENS), ExactTokens(), rotary, 1 + signed + side_bits)
        self._signed, self._matrix = signed, hadamard(dim)
        self._points = (magnitude_codebook if signed else normal_codebook)(CODE_CHANNELS, 1 << CODE_BITS)

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]; T is a multiple of 64."""
        blocks = x.unflatten(2, (-1, BLOCK_TOKENS))  # [B, Hkv, n, 64, D]
        outer = quantize_groups(blocks.square().mean(-1).sqrt(), SIDE_BITS)
        # A token of size zero stays zero.
        size = dequantize_groups(outer)[..., None]
        plain = torch.where(size > 0, blocks / size.clamp(min=torch.finfo(torch.float16).tiny), 0.0)
        shift = quantize_groups(plain.mean(-2), SIDE_BITS)
        turned = turn(plain - dequantize_groups(shift)[..., None, :], self._matrix)
        rms = turned.square().mean(-1, keepdim=True).sqrt()
        codes = self._coded(turned / rms.clamp(min=torch.finfo(torch.float16).tiny))
        points = self._decoded(codes)
        inner = quantize_groups((turned * points).sum(-1) / points.square().sum(-1), SIDE_BITS)
        parts = (part for side in (outer, shift, inner) for part in (side.codes, *side.scales))
        return Payload(codes, CODE_BITS, tuple(parts))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        kept = payload.scales
        outer, shift, inner = (dequantize_groups(Payload(kept[i], SIDE_BITS, kept[i + 1 : i + 3])) for i in (0, 3, 6))
        plain = turn(self._decoded(payload.codes) * inner[..., None], self._matrix) + shift[..., None, :]
        return (plain * outer[..., None]).flatten(2, 3)

    def _coded(self, normal: torch.Tensor) -> torch.Tensor:
        """Return the codes [..., D / 8, 1 or 2] uint8 of vectors [..., D]: the point, and where `signed` the signs."""
        parts = normal.unflatten(-1, (-1, CODE_CHANNELS))
        flat = parts.reshape(1, -1, CODE_CHANNELS)
        codes = nearest_centroids(flat.abs() if self._signed else flat, self._points.to(flat.device)[None])
        codes = codes.view(*parts.shape[:-1], 1)
        if self._signed:
            signs = ((parts < 0).long() << SIGN_PLACES.to(flat.device)).sum(-1, keepdim=True)
            codes = torch.cat((codes, signs), dim=-1)
        return codes.to(torch.uint8)

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the vectors [..., D] of `codes`."""
        points = self._points.to(codes.device)[codes[..., 0].long()]
        if self._signed:
            negative = codes[..., 1, None].long() >> SIGN_PLACES.to(codes.device) & 1
            points = torch.where(negative == 1, -points, points)
        return points.flatten(-2)


class NSNQuant:
    """NSNQuant at 2 or 1 bits."""

    name = "nsnquant"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded before rotary embedding."""
        return "pre_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes matter."""
        codecs: list[RivalCodec] = []
        for layer in layers:
            dim = layer.vectors.shape[2]
            check_power_of_two(self.name, dim)
            if dim < CODE_CHANNELS:
                raise unsupported(self.name, f"head_dim {dim}", f"at least {CODE_CHANNELS} channels, which share a code")
            codecs.append(NormalizedTwice(dim, self.nbits == 2, layer.rotary if side == "keys" else None))
        return codecs
