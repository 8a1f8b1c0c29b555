"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): non-uniform levels, per-channel keys, sparse outliers.

- keys before rotary embedding, each channel with its own offset and range, fixed by calibration (sections 3.1, 3.2)
- values per token over all heads, offset and range taken online
- nuqX: one set of 2^X levels per layer and side on ranges normalized to [-1, 1], from k-means weighted by sensitivity
  (section 3.3); in place of gradients, the root of the attention that a token receives times the mean square of what its
  channel is multiplied with; the squared range is part of the weight
- 1 % of the entries, the outermost per channel (keys) and per token (values), stay exact in sparse form (section 3.4)
- the first token stays exact (section 3.5)
- Q-Norm, where it pays (2 bits and below): decoded levels are stretched so that mean and variance survive

Kinder than the paper: places of outliers take the smallest integer that can hold them, and a row of the sparse matrix has a
count where the paper has a 32-bit pointer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pqkv_cli.baselines.levels import PARAMETER_BITS, fitted_levels, from_token_rows, nearest_level, token_rows
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.format.layout import RotaryLayout

OUTLIER_SHARE = 0.01
SINKS = ExactTokens(num_sinks=1)
# Entries that levels are fitted to, tokens that entries of values are drawn from, and the share of a mean token's weight that
# every token has.
FIT_ENTRIES = 1 << 17
FIT_TOKENS = 1 << 12
DAMPING = 0.1
Q_NORM_BITS = 2


@dataclass(frozen=True, slots=True)
class LevelPair:
    """Rising levels [K] fp32 that entries are compared with, and what their codes decode to."""

    levels: torch.Tensor
    decoded: torch.Tensor

    @property
    def table_bytes(self) -> int:
        """Bytes of both in half precision."""
        return 4 * self.levels.numel()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what `codes` stand for, fp32."""
        decoded: torch.Tensor = self.decoded.to(codes.device)[codes.long()]
        return decoded

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the code of every entry of `x`."""
        return nearest_level(x, self.levels.to(x.device))


class PerChannelLevels(RivalCodec):
    """Keys: offset and range of every channel are known beforehand; entries outside are outliers, however many there are.

    Parameters
    ----------
    offset, half_range
        [Hkv, D] fp32.
    levels
        Of normalized entries.
    sparse
        Whether entries outside the range stay exact, else they take the outermost level.
    expected_share
        Share of outliers on calibration text.
    """

    def __init__(
        self,
        offset: torch.Tensor,
        half_range: torch.Tensor,
        levels: LevelPair,
        nbits: int,
        *,
        sparse: bool,
        expected_share: float,
        rotary: RotaryLayout | None,
    ) -> None:
        width = offset.numel()
        place = _place_dtype(width)
        sparse_bits = expected_share * (16 + 8 * place.itemsize) + 8 * place.itemsize / width if sparse else 0.0
        table_bytes = 4 * width + levels.table_bytes
        super().__init__(Grouping("token"), SINKS, rotary, nbits + sparse_bits, table_bytes)
        self._offset, self._half_range = offset.half().float().flatten(), half_range.half().float().flatten()
        self._levels, self._nbits, self._sparse, self._place = levels, nbits, sparse, place

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        rows = token_rows(x).flatten(0, 1)
        scaled = _normalized(rows, self._offset.to(x.device), self._half_range.to(x.device))
        codes = self._levels.encode(scaled)
        if not self._sparse:
            return Payload(codes, self._nbits)
        return Payload(codes, self._nbits, outliers=_sparse(rows, scaled.abs() > 1, self._place))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        device = payload.codes.device
        rows = self._levels.decode(payload.codes) * self._half_range.to(device) + self._offset.to(device)
        _restore(rows, payload.outliers)
        return from_token_rows(rows, shape)


class PerTokenLevels(RivalCodec):
    """Values: offset and range come from the token itself, without its `num_outliers` largest and smallest entries."""

    def __init__(self, levels: LevelPair, nbits: int, width: int, num_outliers: int) -> None:
        self._place = _place_dtype(width)
        sparse = 2 * num_outliers * (16 + 8 * self._place.itemsize)
        super().__init__(Grouping("token"), SINKS, None, nbits + (PARAMETER_BITS + sparse) / width, levels.table_bytes)
        self._levels, self._nbits, self._num_outliers = levels, nbits, num_outliers

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        rows = token_rows(x).flatten(0, 1)
        offset, half_range, outer = token_ranges(rows, self._num_outliers)
        scaled = _normalized(rows, offset.float()[:, None], half_range.float()[:, None])
        codes = self._levels.encode(scaled)
        # As many in every token, so no counts are needed.
        sparse = (rows.gather(1, outer).half(), outer.to(self._place)) if self._num_outliers else ()
        return Payload(codes, self._nbits, (offset, half_range), sparse)

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        offset, half_range = (scale.float()[:, None] for scale in payload.scales)
        rows = self._levels.decode(payload.codes) * half_range + offset
        if payload.outliers:
            values, places = payload.outliers
            rows.scatter_(1, places.long(), values.float())
        return from_token_rows(rows, shape)


class KVQuant:
    """KVQuant with `outlier_share` of the entries in sparse form; 0 leaves them out."""

    def __init__(self, nbits: int, outlier_share: float = OUTLIER_SHARE, name: str = "kvquant") -> None:
        self.name, self.nbits, self._share = name, nbits, outlier_share

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded before rotary embedding."""
        return "pre_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Fit ranges and levels, each layer for itself."""
        fit = self._fit_keys if side == "keys" else self._fit_values
        return [fit(layer, torch.Generator().manual_seed(seed + i)) for i, layer in enumerate(layers)]

    def _fit_keys(self, layer: Samples, generator: torch.Generator) -> RivalCodec:
        low, high = channel_range(layer.vectors, self._share)
        offset, half_range = (high + low) / 2, (high - low) / 2
        heads, tokens, dim = layer.vectors.shape
        drawn = torch.randint(heads * tokens * dim, (FIT_ENTRIES,), generator=generator)
        # Channel by channel: entry (h, t, d) has the range of (h, d).
        channel = drawn // (tokens * dim) * dim + drawn % dim
        entries = _normalized(layer.vectors.reshape(-1)[drawn], offset.flatten()[channel], half_range.flatten()[channel])
        weights = _token_sensitivity(layer).flatten()[drawn // dim]
        weights = weights * (layer.channel_weight * half_range.square()).flatten()[channel]
        within = entries.abs() <= 1
        levels = _levels(entries[within], weights[within], self.nbits)
        outside = (layer.vectors < low[:, None]) | (layer.vectors > high[:, None])
        return PerChannelLevels(
            offset,
            half_range,
            levels,
            self.nbits,
            sparse=self._share > 0,
            expected_share=float(outside.float().mean()),
            rotary=layer.rotary,
        )

    def _fit_values(self, layer: Samples, generator: torch.Generator) -> RivalCodec:
        chosen = torch.randperm(layer.vectors.shape[1], generator=generator)[:FIT_TOKENS]
        rows = layer.vectors[:, chosen].transpose(0, 1).flatten(1)  # [n, Hkv * D]
        num_outliers = max(1, round(self._share / 2 * rows.shape[1])) if self._share else 0
        offset, half_range, outer = token_ranges(rows, num_outliers)
        scaled = _normalized(rows, offset.float()[:, None], half_range.float()[:, None])
        weights = _token_sensitivity(layer)[:, chosen, None] * layer.channel_weight[:, None]
        weights = weights.transpose(0, 1).flatten(1) * half_range.float().square()[:, None]
        inside = torch.ones_like(rows, dtype=torch.bool).scatter_(1, outer, False)
        entries, weights = scaled[inside], weights[inside]
        drawn = torch.randint(len(entries), (min(FIT_ENTRIES, len(entries)),), generator=generator)
        return PerTokenLevels(_levels(entries[drawn], weights[drawn], self.nbits), self.nbits, rows.shape[1], num_outliers)


def channel_range(vectors: torch.Tensor, outlier_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends [Hkv, D] between which all but `outlier_share` of each channel of `vectors` [Hkv, N, D] lie."""
    columns = vectors.mT.contiguous()
    num_tokens = vectors.shape[1]
    cut = round(outlier_share / 2 * (num_tokens - 1))
    return columns.kthvalue(cut + 1, dim=-1).values, columns.kthvalue(num_tokens - cut, dim=-1).values


def token_ranges(rows: torch.Tensor, num_outliers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return offset and half range [N] fp16 of `rows` [N, C] without their outermost entries, and where those lie."""
    order = rows.argsort(dim=1)
    outer = torch.cat((order[:, :num_outliers], order[:, order.shape[1] - num_outliers :]), dim=1)
    low = rows.gather(1, order[:, num_outliers : num_outliers + 1])[:, 0]
    high = rows.gather(1, order[:, order.shape[1] - num_outliers - 1, None])[:, 0]
    return ((high + low) / 2).half(), ((high - low) / 2).half(), outer


def _normalized(x: torch.Tensor, offset: torch.Tensor, half_range: torch.Tensor) -> torch.Tensor:
    return (x - offset) / half_range.clamp(min=torch.finfo(torch.float16).tiny)


def _token_sensitivity(layer: Samples) -> torch.Tensor:
    """Return the weight [Hkv, N] of every token's entries."""
    mass = layer.token_weight
    mass = mass / mass.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return mass.sqrt() + DAMPING


def _levels(entries: torch.Tensor, weights: torch.Tensor, nbits: int) -> LevelPair:
    levels = fitted_levels(entries, weights, 1 << nbits).half().float()
    if nbits > Q_NORM_BITS:
        return LevelPair(levels, levels)
    coded = levels[nearest_level(entries, levels).long()]
    stretch = entries.std() / coded.std().clamp(min=torch.finfo(torch.float32).tiny)
    return LevelPair(levels, ((levels - coded.mean()) * stretch + entries.mean()).half().float())


def _place_dtype(width: int) -> torch.dtype:
    return torch.uint8 if width <= 256 else torch.int16


def _sparse(rows: torch.Tensor, mask: torch.Tensor, place: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return values, channels and the number per row of the entries of `rows` [N, C] in `mask`."""
    counts = mask.sum(1).clamp(max=torch.iinfo(place).max)
    return rows[mask].half(), mask.nonzero()[:, 1].to(place), counts.to(place)


def _restore(rows: torch.Tensor, outliers: tuple[torch.Tensor, ...]) -> None:
    """Write `outliers` of `_sparse` back into `rows`."""
    if outliers:
        values, places, counts = outliers
        owners = torch.arange(len(rows), device=rows.device).repeat_interleave(counts.long())
        rows[owners, places.long()] = values.float()
