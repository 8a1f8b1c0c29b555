"""KVarN (Muller et al. 2026, arXiv 2606.03458): variance normalization along tokens and channels. Needs no calibration.

Per head and tile of 128 tokens: channels go through a Walsh-Hadamard transform, then tokens and channels are divided by their
standard deviations in turn until both are even (16 rounds, as in the authors' release; the scales of the most even round are
taken, by the measure of imbalance of their earlier SINQ, arXiv 2509.22944), then entries are rounded to equally spaced levels
with a range per channel of the tile for keys and per token for values. Keys are coded after rotary embedding.

The scale along the axis of the ranges is part of them, so a tile stores, in half precision: scale and zero point per channel
and one scale per token (keys), or scale and zero point per token and one scale per channel (values). Shipped with 4 bits for
keys and 2 for values (``kvarn-k4v2``); the paper's tables are 2 bits for both. The pool of exact sinks and the unfinished tile
of the release in vLLM: tokens of an unfinished tile stay exact here too, sinks are not kept. Ours: scales below 1/128 of their
mean are raised to it, as half precision could not hold what a large channel that hardly varies is divided into.
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.levels import PARAMETER_BITS, dequantize_groups, quantize_groups
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples
from pqkv_cli.baselines.transforms import check_power_of_two, hadamard, turn
from pqkv_cli.specs import KeySpace, Side

TILE_TOKENS = 128
MOST_GROUP_CHANNELS = 128
ROUNDS = 16
SCALE_BITS = 16
# Stored scales are at least this share of their mean.
LEAST_SCALE = 1 / 128


class BalancedKeys(RivalCodec):
    """A range per channel of a tile, and a scale per token."""

    def __init__(self, nbits: int, dim: int) -> None:
        bits = nbits + PARAMETER_BITS / TILE_TOKENS + SCALE_BITS / dim
        super().__init__(Grouping("token_block", TILE_TOKENS), ExactTokens(), None, bits)
        self._nbits, self._matrix = nbits, hadamard(dim)

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]; T is a multiple of 128."""
        tiles = turn(x, self._matrix).unflatten(2, (-1, TILE_TOKENS))
        per_token = balance(tiles)[0].half()
        coded = quantize_groups((tiles / per_token.float()).mT, self._nbits)
        return Payload(coded.codes, self._nbits, (*coded.scales, per_token))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        *ranges, per_token = payload.scales
        tiles = dequantize_groups(Payload(payload.codes, self._nbits, tuple(ranges))).mT * per_token.float()
        return turn(tiles.flatten(2, 3), self._matrix)


class BalancedValues(RivalCodec):
    """A range per token in groups of at most 128 channels, and a scale per channel of a tile."""

    def __init__(self, nbits: int, dim: int) -> None:
        self._group_size = min(dim, MOST_GROUP_CHANNELS)
        bits = nbits + PARAMETER_BITS / self._group_size + SCALE_BITS / TILE_TOKENS
        super().__init__(Grouping("token_block", TILE_TOKENS), ExactTokens(), None, bits)
        self._nbits, self._matrix = nbits, hadamard(dim)

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]; T is a multiple of 128."""
        tiles = turn(x, self._matrix).unflatten(2, (-1, TILE_TOKENS))
        per_channel = balance(tiles)[1].half()
        even = tiles / per_channel.float()
        coded = quantize_groups(even.unflatten(-1, (-1, self._group_size)), self._nbits)
        return Payload(coded.codes, self._nbits, (*coded.scales, per_channel))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        *ranges, per_channel = payload.scales
        even = dequantize_groups(Payload(payload.codes, self._nbits, tuple(ranges))).flatten(-2)
        return turn((even * per_channel.float()).flatten(2, 3), self._matrix)


class KVarN:
    """KVarN with `key_bits` and `value_bits`; `nbits` is their mean."""

    def __init__(self, nbits: int, key_bits: int | None = None, value_bits: int | None = None, name: str = "kvarn") -> None:
        self.name, self.nbits = name, nbits
        self._bits: dict[Side, int] = {"keys": key_bits or nbits, "values": value_bits or nbits}

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes matter."""
        codecs: list[RivalCodec] = []
        for layer in layers:
            dim = layer.vectors.shape[2]
            check_power_of_two(self.name, dim)
            codecs.append((BalancedKeys if side == "keys" else BalancedValues)(self._bits[side], dim))
        return codecs


def balance(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales per token [..., T, 1] and channel [..., 1, D] that make standard deviations of `tiles` [..., T, D] even.

    Both have a mean of about 1. Of all rounds the one is taken whose largest standard deviation of a token or channel is the
    smallest multiple of the smallest one.
    """
    per_token, per_channel = torch.ones_like(tiles[..., :1]), torch.ones_like(tiles[..., :1, :])
    best = (per_token, per_channel)
    least = _imbalance(tiles)
    for _ in range(ROUNDS):
        per_channel = _bounded(per_channel * _spread(tiles / per_token / per_channel, -2))
        per_token = _bounded(per_token * _spread(tiles / per_token / per_channel, -1))
        found = _imbalance(tiles / per_token / per_channel)
        better = found < least
        least = torch.where(better, found, least)
        best = (torch.where(better, per_token, best[0]), torch.where(better, per_channel, best[1]))
    return best


def _bounded(scales: torch.Tensor) -> torch.Tensor:
    """Return `scales` of tiles [..., T, 1] or [..., 1, D] with a mean of 1 and none very small.

    Ranges take up any common factor. Without the bound a channel that is large and hardly varies would have scales, or ranges
    of what is divided by them, that no half can hold.
    """
    return (scales / scales.mean((-2, -1), keepdim=True)).clamp(min=LEAST_SCALE)


def _spread(tiles: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the standard deviations along `dim`, 1 where everything is equal."""
    spread = tiles.std(dim=dim, keepdim=True)
    return torch.where(spread > 0, spread, 1.0)


def _imbalance(tiles: torch.Tensor) -> torch.Tensor:
    """Return the largest standard deviation of a token or channel over the smallest one, [..., 1, 1]."""
    spreads = torch.cat((_spread(tiles, -1).squeeze(-1), _spread(tiles, -2).squeeze(-2)), dim=-1)
    return (spreads.amax(-1) / spreads.amin(-1))[..., None, None]
