"""Samples and codecs for tests of the rivals."""

import torch

from pqkv_cli.baselines.protocol import RivalCodec, Samples
from pqkv_cli.baselines.registry import METHODS
from pqkv_cli.specs import Side
from pqkv_kernels.format.layout import RotaryLayout

HEADS, DIM, TOKENS = 2, 16, 512


def samples(seed: int = 0, heads: int = HEADS, dim: int = DIM, outlier: float = 1.0, tokens: int = TOKENS) -> Samples:
    """Vectors with a small mean per channel; `outlier` scales channel 3 of every head."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(heads, 1, dim, generator=torch.Generator().manual_seed(77)) / 2  # the same for every seed
    vectors = torch.randn(heads, tokens, dim, generator=g) + means
    vectors[:, :, 3] *= outlier
    return Samples(vectors, torch.rand(heads, tokens, generator=g), torch.ones(heads, dim), RotaryLayout(dim))


def codec_of(name: str, rate: int, given: Samples | None = None, side: Side = "keys") -> RivalCodec:
    return METHODS[name].make(rate).fit(side, [samples() if given is None else given], 0)[0]


def relative_error(codec: RivalCodec, x: torch.Tensor) -> torch.Tensor:
    """Squared error of each channel [Hkv, D] over the channel's variance."""
    return (codec.encode_decode(x[None])[0] - x).square().mean(1) / x.var(1)
