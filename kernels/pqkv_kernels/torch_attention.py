"""Attention over codes in torch, made fast for CPUs: the same meaning as `pqkv_kernels.attention.code_attention`.

Pages are decoded one tile at a time, small enough for the second-level cache, straight into complex pairs (see `planes`).
A few queries meet them page by page with the page's rotation folded into the query; many queries meet a tile brought to model
space once. A tile is decoded once however many queries there are, and nothing decoded outlives it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pqkv_kernels.angles import Angles, PageAngles, page_range
from pqkv_kernels.attention import Part, merge
from pqkv_kernels.layout import PAGE_TOKENS
from pqkv_kernels.planes import Planes, read_planes

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
    query: torch.Tensor,
    key_pages: Sequence[torch.Tensor],
    value_pages: Sequence[torch.Tensor],
    keys: Planes,
    values: Planes,
    first_token: torch.Tensor,
    scaling: float,
    angles: Angles | PageAngles | None = None,
    softcap: float | None = None,
) -> Part:
    """Attend as `pqkv_kernels.attention.code_attention` does, over slabs of pages and with codecs as planes."""
    batch, heads, group, num_queries, dim = query.shape
    rows = query.gather(4, keys.channels[None, :, None, None].flatten(4).expand(batch, -1, group, num_queries, -1))
    reader = _Reader(keys, values, rows.flatten(2, 3).unflatten(-1, (dim // 2, 2)), angles)
    tile_pages = max(1, TILE_ENTRIES // (batch * heads * (dim // 2) * PAGE_TOKENS))
    block_pages = max(1, BLOCK_SCORES // (batch * heads * group * num_queries * PAGE_TOKENS))
    parts = []
    for tiles in _blocks(_tiles(key_pages, value_pages, min(tile_pages, block_pages)), block_pages):
        logits = torch.cat([reader.scores(tile) for tile in tiles], dim=-1) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        slots = torch.arange(tiles[0].start * PAGE_TOKENS, tiles[-1].stop * PAGE_TOKENS, device=query.device)
        logits = logits.masked_fill((slots < first_token[:, None])[:, None, None], -torch.inf)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        shares = weights.split([(tile.stop - tile.start) * PAGE_TOKENS for tile in tiles], dim=-1)
        output = sum(reader.weighted(tile, share) for tile, share in zip(tiles, shares, strict=True))
        assert isinstance(output, torch.Tensor)  # a block has at least one tile
        parts.append((output.unflatten(2, (group, num_queries)), lse.unflatten(2, (group, num_queries))))
    return merge(parts) if parts else (torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf))


class _Reader:
    """Scores decoded keys with the queries `rows` [B, Hkv, N, D / 2, 2] and adds up decoded values."""

    def __init__(self, keys: Planes, values: Planes, rows: torch.Tensor, angles: Angles | PageAngles | None) -> None:
        self._keys, self._values, self._rows, self._angles = keys, values, rows, angles
        self._few = rows.shape[2] <= FEW_QUERIES
        self._step = rows.new_ones(())
        if isinstance(angles, PageAngles):
            self._step = _plane_factors(angles.step, keys).mT.contiguous()
        self._buffers: list[torch.Tensor] = []

    def scores(self, tile: _Tile) -> torch.Tensor:
        """Return the products [B, Hkv, N, T] of the queries with the tile's keys."""
        decoded = self._read(tile.keys, self._keys)
        base = None
        angles = page_range(self._angles, tile.start, tile.stop)
        if isinstance(angles, PageAngles):
            decoded *= self._step
            base = _plane_factors(angles.base, self._keys).transpose(1, 2)  # [B, P, Hkv, D / 2]
        elif angles is not None:
            factors = _plane_factors(angles, self._keys)  # [B, Hkv, T, D / 2]
            decoded *= factors.unflatten(2, (-1, PAGE_TOKENS)).permute(0, 2, 1, 4, 3)
        if self._few:
            return self._page_scores(decoded, base)
        if base is not None:
            decoded *= base[..., None]
        dense = torch.view_as_real(decoded).permute(0, 2, 3, 5, 1, 4).flatten(4).flatten(2, 3)  # [B, Hkv, D, T]
        return self._rows.flatten(3) @ dense

    def _page_scores(self, decoded: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """Score [B, P, Hkv, D / 2, 64] with queries turned back by each page's base."""
        batch, pages, heads, planes, tokens = decoded.shape
        queries = torch.view_as_complex(self._rows.contiguous())[:, None]
        if base is not None:
            queries = queries * base[:, :, :, None].conj()
        parts = torch.view_as_real(queries).permute(0, 1, 2, 5, 3, 4).flatten(3, 4)  # [B, P or 1, Hkv, 2 * N, D / 2]
        left = parts.expand(batch, pages, heads, -1, -1).reshape(batch * pages * heads, -1, planes)
        right = torch.view_as_real(decoded).view(batch * pages * heads, planes, 2 * tokens)
        products = torch.bmm(left, right).view(batch, pages, heads, 2, -1, tokens, 2)
        scores = products[:, :, :, 0, ..., 0] + products[:, :, :, 1, ..., 1]
        return scores.permute(0, 2, 3, 1, 4).flatten(3)

    def weighted(self, tile: _Tile, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum [B, Hkv, N, D] of the tile's values with `weights` [B, Hkv, N, T]."""
        decoded = self._read(tile.values, self._values)
        batch, pages, heads, planes, tokens = decoded.shape
        if not self._few:
            dense = torch.view_as_real(decoded).permute(0, 2, 1, 4, 3, 5).reshape(batch, heads, pages * tokens, 2 * planes)
            return weights @ dense
        count = weights.shape[2]
        # Both components lie side by side: weights for the first are zero at the second and the other way round.
        left = weights.new_zeros(batch, pages, heads, 2, count, tokens, 2)
        left[:, :, :, 0, ..., 0] = left[:, :, :, 1, ..., 1] = weights.unflatten(-1, (pages, tokens)).permute(0, 3, 1, 2, 4)
        right = torch.view_as_real(decoded).view(batch * pages * heads, planes, 2 * tokens)
        sums = torch.bmm(left.view(batch * pages * heads, 2 * count, 2 * tokens), right.mT)
        return sums.view(batch, pages, heads, 2, count, planes).sum(1).permute(0, 1, 3, 4, 2).flatten(3)

    def _read(self, pages: torch.Tensor, planes: Planes) -> torch.Tensor:
        count = pages.shape[0] * pages.shape[1] * pages.shape[2] * planes.num_planes * PAGE_TOKENS
        # Autograd may hold on to what the queries met: then every tile gets buffers of its own.
        keep = not (torch.is_grad_enabled() and self._rows.requires_grad)
        if not keep or not self._buffers or self._buffers[0].numel() < count:
            stages = max(len(self._keys.stages), len(self._values.stages))
            dtypes = (torch.int32, torch.int64, *([torch.int64] if stages > 1 else []))
            self._buffers = [torch.empty(count, dtype=dtype, device=pages.device) for dtype in dtypes]
        index, values, *spare = self._buffers
        return read_planes(pages, planes, index, values, spare[0] if spare else values)


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


def _plane_factors(angles: Angles, planes: Planes) -> torch.Tensor:
    """Return complex factors [..., Hkv, N, D / 2] of `angles` [..., N, R / 2]: one where a plane is not rotated."""
    assert planes.pairs is not None  # angles are given only for keys coded before rotary embedding
    factors = torch.nn.functional.pad(torch.complex(*angles), (0, 1), value=1.0)
    return (
        factors[..., None, :, :]
        .expand(*factors.shape[:-2], len(planes.pairs), -1, -1)
        .gather(-1, planes.pairs[:, None].expand(*factors.shape[:-2], -1, factors.shape[-2], -1))
    )
