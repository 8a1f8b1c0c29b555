"""Attention over codes in torch, made fast for CPUs: the same meaning as `pqkv_kernels.reference.attention.code_attention`.

Pages are decoded one tile at a time, small enough for the second-level cache, straight into complex pairs (see `planes`).
A few queries meet them page by page with the page's rotation folded into the query; many queries meet a tile brought to model
space once. A tile is decoded once however many queries there are, and nothing decoded outlives it.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.pairs import Planes, plane_factors, read_planes, step_factors
from pqkv_kernels.format.rotary import Angles, PageAngles, page_range
from pqkv_kernels.format.tokens import CodedTokens, Part
from pqkv_kernels.reference.attention import merge, softmax_parts
from pqkv_kernels.reference.prediction import plane_prediction
from pqkv_kernels.reference.score_tables import score_tables, table_scores

TILE_ENTRIES = 1 << 17  # decoded pairs of channels at a time: 1 MiB
BLOCK_SCORES = 1 << 22  # logits at a time: 16 MiB
FEW_QUERIES = 16


@dataclass(frozen=True, slots=True)
class _Tile:
    """Pages ``start:stop`` of the cache with their bytes, [B, stop - start, Hkv, page_bytes]."""

    start: int
    stop: int
    keys: torch.Tensor
    values: torch.Tensor


def plane_attention(
    query: torch.Tensor, tokens: CodedTokens, keys: Planes, values: Planes, scaling: float, softcap: float | None = None
) -> Part:
    """Attend as `pqkv_kernels.reference.attention.code_attention` does, with the codecs of `tokens` as planes."""
    key_pages, value_pages, spans = tokens.key_pages, tokens.value_pages, tokens.spans
    batch, heads, group, num_queries, dim = query.shape
    rows = query.gather(4, keys.channels[None, :, None, None].flatten(4).expand(batch, -1, group, num_queries, -1))
    reader = _Reader(keys, values, rows.flatten(2, 3).unflatten(-1, (dim // 2, 2)), tokens.angles)
    tile_pages = max(1, TILE_ENTRIES // max(batch * heads * (dim // 2) * PAGE_TOKENS, 1))
    block_pages = max(1, BLOCK_SCORES // max(batch * heads * group * num_queries * PAGE_TOKENS, 1))
    parts, prediction = [], None
    if tokens.values.prediction is not None:
        prediction = plane_prediction(tokens.keys, tokens.values)
    for tiles in _blocks(_tiles(key_pages, value_pages, min(tile_pages, block_pages)), block_pages):
        logits = reader.scores(tiles) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        slots = torch.arange(tiles[0].start * PAGE_TOKENS, tiles[-1].stop * PAGE_TOKENS, device=query.device)
        outside = (slots < spans[:, :1]) | (slots >= spans[:, 1:])
        logits = logits.masked_fill(outside[:, None, None], -torch.inf)
        weights, total, lse = softmax_parts(logits)
        output = reader.weighted([tile.values for tile in tiles], values, weights)
        if prediction is not None:
            output = output + reader.weighted([tile.keys for tile in tiles], keys, weights) @ prediction
        output = output / total
        parts.append((output.unflatten(2, (group, num_queries)), lse.unflatten(2, (group, num_queries))))
    return merge(parts) if parts else (torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf))


class _Reader:
    """Scores decoded keys with the queries `rows` [B, Hkv, N, D / 2, 2] and adds up decoded values, over runs of tiles."""

    def __init__(self, keys: Planes, values: Planes, rows: torch.Tensor, angles: Angles | PageAngles | None) -> None:
        self._keys, self._values, self._rows, self._angles = keys, values, rows, angles
        self._few = rows.shape[2] <= FEW_QUERIES
        self._step = self._base = None
        # One query per head meets keys that are not rotated: products with centroids are looked up, nothing is decoded.
        is_looked_up = keys.pairs is None and rows.shape[2] == 1
        self._scores = score_tables(rows, keys) if is_looked_up else None
        if isinstance(angles, PageAngles):
            self._step = step_factors(angles, keys)
            self._base = plane_factors(angles.base, keys).permute(2, 0, 1, 3)  # [P, B, Hkv, D / 2]

    def scores(self, tiles: list[_Tile]) -> torch.Tensor:
        """Return the products [B, Hkv, N, T] of the queries with the keys of `tiles`."""
        if self._scores is not None:
            return torch.cat([table_scores(tile.keys, self._keys, self._scores) for tile in tiles], dim=-1)
        if not self._few:
            return torch.cat([self._rows.flatten(3) @ self._dense_keys(tile) for tile in tiles], dim=-1)
        batch, heads, count, planes, _ = self._rows.shape
        queries = self._page_queries(tiles[0].start, tiles[-1].stop)
        parts = queries.split([(tile.stop - tile.start) * batch * heads for tile in tiles])
        products = [torch.bmm(part, _matrices(self._rotated_keys(tile))) for part, tile in zip(parts, tiles, strict=True)]
        grid = torch.cat(products).view(-1, batch, heads, 2, count, PAGE_TOKENS, 2)
        return (grid[:, :, :, 0, ..., 0] + grid[:, :, :, 1, ..., 1]).permute(1, 2, 3, 0, 4).flatten(3)

    def weighted(self, tiles: list[torch.Tensor], planes: Planes, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum [B, Hkv, N, D] of what the pages of `tiles` hold, unrotated, with `weights` [B, Hkv, N, T]."""
        batch, heads, count, _ = weights.shape
        if not self._few:
            shares = weights.split([tile.shape[1] * PAGE_TOKENS for tile in tiles], dim=-1)
            total = sum(share @ self._dense(tile, planes) for share, tile in zip(shares, tiles, strict=True))
            assert isinstance(total, torch.Tensor)  # a block has at least one tile
            return total
        # Both components lie side by side: weights for the first are zero at the second and the other way round.
        pages = weights.unflatten(-1, (-1, PAGE_TOKENS)).permute(3, 0, 1, 2, 4)
        left = weights.new_zeros(*pages.shape[:3], 2, *pages.shape[3:], 2)
        left[:, :, :, 0, ..., 0] = left[:, :, :, 1, ..., 1] = pages
        parts = left.view(-1, 2 * count, 2 * PAGE_TOKENS).split([tile.shape[1] * batch * heads for tile in tiles])
        sums = [torch.bmm(part, _matrices(self._read(tile, planes)).mT) for part, tile in zip(parts, tiles, strict=True)]
        return torch.cat(sums).view(len(pages), batch, heads, 2, count, -1).sum(0).permute(0, 1, 3, 4, 2).flatten(3)

    def _page_queries(self, start: int, stop: int) -> torch.Tensor:
        """Return both components of the queries, rotated back by each page's base: [P * B * Hkv, 2 * N, D / 2]."""
        queries = torch.view_as_complex(self._rows.contiguous())[None]
        if self._base is not None:
            queries = queries * self._base[start:stop, :, :, None].conj()
        parts = torch.view_as_real(queries).permute(0, 1, 2, 5, 3, 4)
        return parts.expand(stop - start, *parts.shape[1:]).reshape(-1, 2 * parts.shape[4], parts.shape[5])

    def _rotated_keys(self, tile: _Tile) -> torch.Tensor:
        """Return keys [P, B, Hkv, D / 2, 64] complex, rotated by all but the base of their page."""
        decoded = self._read(tile.keys, self._keys)
        if self._step is not None:
            decoded *= self._step
        elif self._angles is not None:
            angles = page_range(self._angles, tile.start, tile.stop)
            assert isinstance(angles, tuple)  # or there would be a step
            factors = plane_factors(angles, self._keys)  # [B, Hkv, T, D / 2]
            decoded *= factors.unflatten(2, (-1, PAGE_TOKENS)).permute(2, 0, 1, 4, 3)
        return decoded

    def _dense_keys(self, tile: _Tile) -> torch.Tensor:
        """Return keys [B, Hkv, D, T] as the queries score them."""
        decoded = self._rotated_keys(tile)
        if self._base is not None:
            decoded *= self._base[tile.start : tile.stop, ..., None]
        return torch.view_as_real(decoded).permute(1, 2, 3, 5, 0, 4).flatten(4).flatten(2, 3)

    def _dense(self, pages: torch.Tensor, planes: Planes) -> torch.Tensor:
        """Return what `pages` hold, unrotated, [B, Hkv, T, D]."""
        decoded = torch.view_as_real(self._read(pages, planes))
        return decoded.permute(1, 2, 0, 4, 3, 5).flatten(4).flatten(2, 3)

    def _read(self, pages: torch.Tensor, planes: Planes) -> torch.Tensor:
        count = pages.shape[0] * pages.shape[1] * pages.shape[2] * planes.num_planes * PAGE_TOKENS
        stages = max(len(self._keys.stages), len(self._values.stages))
        # Autograd may hold on to what the queries met: then every tile gets buffers of its own.
        is_kept = torch.is_grad_enabled() and self._rows.requires_grad
        index, values, *spare = _new_buffers(count, stages, pages.device) if is_kept else _buffers(count, stages, pages.device)
        return read_planes(pages.transpose(0, 1), planes, index, values, spare[0] if spare else values)


def _matrices(decoded: torch.Tensor) -> torch.Tensor:
    """Return [P, B, Hkv, D / 2, 64] complex as real matrices [P * B * Hkv, D / 2, 128]."""
    return torch.view_as_real(decoded).view(-1, decoded.shape[3], 2 * PAGE_TOKENS)


def _buffers(count: int, stages: int, device: torch.device) -> list[torch.Tensor]:
    """Return this thread's buffers for one tile: kept, because touching fresh memory costs as much as decoding into it."""
    key = (device, stages > 1)
    held: dict[Any, list[torch.Tensor]] = _held.__dict__
    if key not in held or held[key][0].numel() < count:
        held[key] = _new_buffers(max(count, TILE_ENTRIES), stages, device)
    return held[key]


def _new_buffers(count: int, stages: int, device: torch.device) -> list[torch.Tensor]:
    dtypes = (torch.int32, torch.int64, *([torch.int64] if stages > 1 else []))
    return [torch.empty(count, dtype=dtype, device=device) for dtype in dtypes]


_held = threading.local()


def _tiles(key_pages: Sequence[torch.Tensor], value_pages: Sequence[torch.Tensor], tile_pages: int) -> Iterator[_Tile]:
    first = 0
    for keys, values in zip(key_pages, value_pages, strict=True):
        for start in range(0, keys.shape[1], tile_pages):
            part = slice(start, start + tile_pages)
            taken = keys[:, part]
            yield _Tile(first + start, first + start + taken.shape[1], taken, values[:, part])
        first += keys.shape[1]


def _blocks(tiles: Iterator[_Tile], block_pages: int) -> Iterator[list[_Tile]]:
    """Yield runs of tiles of at most `block_pages` pages."""
    block: list[_Tile] = []
    for tile in tiles:
        if block and tile.stop - block[0].start > block_pages:
            yield block
            block = []
        block.append(tile)
    if block:
        yield block
