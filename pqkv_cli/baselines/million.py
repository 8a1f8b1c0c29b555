"""MILLION (Wang et al., DAC 2025, arXiv 2504.03661): product quantization with one codebook for the whole model.

As released: keys after rotary embedding, one key and one value codebook [M, 2^nbits, D / M] shared by all layers and heads,
plain L2 k-means with 25 iterations on vectors pooled from everywhere, no exact tokens. Two things are kinder than the
release: codebooks are calibrated on calibration text, not on the text they are judged by, and codes of 12 bits count 12
bits where the release stores 16. Rates as published for D = 128: 4 bits are (D/2, 8), 3 (D/4, 12), 2 (D/4, 8); 1 is (D/8, 8).
"""

from collections.abc import Mapping, Sequence

import torch

from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples, unsupported
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.dispatch import nearest_centroids

# Bits per channel: (channels per code, bits per code).
CODES: Mapping[int, tuple[int, int]] = {4: (2, 8), 3: (4, 12), 2: (4, 8), 1: (8, 8)}
ITERATIONS = 25
# faiss, which the release trains with, draws at most this many points per centroid.
POINTS_PER_CENTROID = 256
# Points times centroids: 12-bit codebooks get 8 points per centroid, for the sake of time.
MOST_WORK = 1 << 27


class SharedCodebook(RivalCodec):
    """Product quantization by one codebook [M, K, dsub] for all heads; the same object's tensor serves all layers."""

    def __init__(self, codebook: torch.Tensor, nbits: int, table_bytes: int) -> None:
        super().__init__(Grouping("token"), ExactTokens(), None, nbits / codebook.shape[2], table_bytes)
        self._codebook, self._nbits = codebook.half(), nbits

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        self._codebook = self._codebook.to(x.device)
        points = x.unflatten(-1, (len(self._codebook), -1)).flatten(0, 2).transpose(0, 1)
        codes = nearest_centroids(points, self._codebook.float())
        return Payload(codes.to(torch.int16), self._nbits)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        index = payload.codes.long()[..., None].expand(-1, -1, self._codebook.shape[2])
        decoded: torch.Tensor = self._codebook.float().gather(1, index).transpose(0, 1).reshape(shape)
        return decoded


class Million:
    """One codebook per side for all layers and heads."""

    name = "million"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded after rotary embedding."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Fit one codebook on vectors pooled from all layers and heads (of one head_dim)."""
        subspace_dim, nbits = CODES[self.nbits]
        codebooks: dict[int, torch.Tensor] = {}
        for dim in {layer.vectors.shape[2] for layer in layers}:
            if dim % subspace_dim:
                raise unsupported(self.name, f"head_dim {dim}", f"a multiple of {subspace_dim} at {self.nbits} bits")
            pooled = torch.cat([s.vectors.flatten(0, 1) for s in layers if s.vectors.shape[2] == dim])
            codebooks[dim] = _fit(pooled, subspace_dim, nbits, seed)
        codecs: list[RivalCodec] = []
        for index, layer in enumerate(layers):
            codebook = codebooks[layer.vectors.shape[2]]
            # Stored once for the model: the first layer pays.
            codecs.append(SharedCodebook(codebook, nbits, 2 * codebook.numel() if index == 0 else 0))
        return codecs


def _fit(vectors: torch.Tensor, subspace_dim: int, nbits: int, seed: int) -> torch.Tensor:
    """Return the codebook [M, 2^nbits, dsub] of `vectors` [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    most = min(POINTS_PER_CENTROID << nbits, MOST_WORK >> nbits)
    if len(vectors) > most:
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:most]]
    points = vectors.float().unflatten(-1, (-1, subspace_dim)).transpose(0, 1).contiguous()
    return kmeans(points, 1 << nbits, iterations=ITERATIONS, generator=generator).centroids
