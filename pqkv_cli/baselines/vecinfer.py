"""VecInfer (Yao et al., ACL 2026, arXiv 2510.06175): product quantization of keys without outliers.

- keys, after rotary embedding: each channel is divided by ``lambda_c``, the root of its largest magnitude on calibration
  text, and heads are turned by a Walsh-Hadamard transform; queries take both in the other direction, so scores stay what they
  were (the paper's smooth and Hadamard transformations). Here keys are turned back instead, which is the same
- values as they are
- one codebook per layer, side and head, shared by all its sub-vectors, by k-means in the transformed space. Sub-vectors of d
  channels with b bits: (2, 8), (4, 12), (4, 8) and (8, 8) for 4, 3, 2 and 1 bits; the paper has (4, 12), (4, 8), (8, 12) and
  mixtures of 1.25 bits, which are no integer rates
- its window of 128 recent tokens is left out

What could not be checked against the paper: the exponent 1/2 of lambda, and that a codebook is one per head (the authors'
kernels hold one in fast memory, which excludes one per sub-vector at 12 bits). The authors calibrate on a task they are judged
by; here it is calibration text.
"""

from collections.abc import Mapping, Sequence

import torch

from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples, unsupported
from pqkv_cli.baselines.transforms import check_power_of_two, hadamard
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.dispatch import nearest_centroids

# Bits per channel: (channels per code, bits per code).
CODES: Mapping[int, tuple[int, int]] = {4: (2, 8), 3: (4, 12), 2: (4, 8), 1: (8, 8)}
ITERATIONS = 25
# Sub-vectors per head that k-means sees: this many per centroid, and at most so many points times centroids.
POINTS_PER_CENTROID = 128
MOST_WORK = 1 << 26


class PerHeadCodebooks(RivalCodec):
    """Sub-vectors of a head share one codebook.

    Parameters
    ----------
    codebooks
        [Hkv, K, dsub] fp32, of transformed vectors.
    nbits
        Bits per code.
    forward, inverse
        [Hkv, D, D] fp32, the transformation of row vectors and its inverse; None where vectors are coded as they are.
    table_bytes
        Of codebooks and scales.
    """

    def __init__(
        self,
        codebooks: torch.Tensor,
        nbits: int,
        maps: tuple[torch.Tensor, torch.Tensor] | None,
        table_bytes: int,
    ) -> None:
        super().__init__(Grouping("token"), ExactTokens(), None, nbits / codebooks.shape[2], table_bytes)
        self._codebooks, self._nbits, self._maps = codebooks.half(), nbits, maps

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        turned = x @ self._maps[0].to(x.device) if self._maps else x
        points = turned.unflatten(-1, (-1, self._codebooks.shape[2])).transpose(0, 1)  # [Hkv, B, T, M, dsub]
        codes = nearest_centroids(points.flatten(1, 3), self._codebooks.float().to(x.device))
        return Payload(codes.to(torch.int16), self._nbits)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        batch, heads, tokens, dim = shape
        codebooks = self._codebooks.float().to(payload.codes.device)
        index = payload.codes.long()[..., None].expand(-1, -1, codebooks.shape[2])
        turned = codebooks.gather(1, index).view(heads, batch, tokens, dim).transpose(0, 1)
        return turned @ self._maps[1].to(turned.device) if self._maps else turned


class VecInfer:
    """VecInfer at an integer rate."""

    name = "vecinfer"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Fit one codebook per layer and head."""
        return [self._fit_layer(side, layer, seed + index) for index, layer in enumerate(layers)]

    def _fit_layer(self, side: Side, layer: Samples, seed: int) -> RivalCodec:
        num_heads, _, dim = layer.vectors.shape
        subspace_dim, nbits = CODES[self.nbits]
        check_power_of_two(self.name, dim)
        if dim < subspace_dim:
            raise unsupported(self.name, f"head_dim {dim}", f"a multiple of {subspace_dim} at {self.nbits} bits")
        maps = smooth_and_turn(layer.vectors) if side == "keys" else None
        vectors = layer.vectors @ maps[0] if maps else layer.vectors
        codebooks = _fit(vectors.unflatten(-1, (-1, subspace_dim)).flatten(1, 2), nbits, seed)
        return PerHeadCodebooks(codebooks, nbits, maps, 2 * codebooks.numel() + (2 * num_heads * dim if maps else 0))


def smooth_and_turn(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the map [Hkv, D, D] of row vectors that evens channels of `keys` [Hkv, N, D] and turns them, and its inverse."""
    # Scales are stored in half precision.
    scale = keys.abs().amax(1).sqrt().clamp(min=torch.finfo(torch.float16).tiny).half().float()
    matrix = hadamard(keys.shape[2])
    return matrix / scale[..., None], matrix * scale[:, None]


def _fit(points: torch.Tensor, nbits: int, seed: int) -> torch.Tensor:
    """Return the codebooks [Hkv, 2^nbits, dsub] of sub-vectors [Hkv, N, dsub]."""
    generator = torch.Generator().manual_seed(seed)
    most = min(POINTS_PER_CENTROID << nbits, MOST_WORK >> nbits)
    if points.shape[1] > most:
        points = points[:, torch.randperm(points.shape[1], generator=generator)[:most]]
    return kmeans(points.contiguous(), 1 << nbits, iterations=ITERATIONS, generator=generator).centroids
