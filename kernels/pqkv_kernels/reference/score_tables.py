"""Scores without decoding: the products of a query with every centroid, looked up by code and added over a key's codes.

Only for keys coded as the cache is given them: where every token is rotated by its own angle, no table serves two tokens. Good
for one query per key/value head; several are served better by decoding once (a table each would be looked up for each).
"""

import torch

from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.packing import unpack_codes
from pqkv_kernels.format.pairs import Planes


def score_tables(query: torch.Tensor, planes: Planes) -> torch.Tensor:
    """Return the products of queries [B, Hkv, N, D / 2, 2] fp32 in the planes' order with every centroid, [B, Hkv, N, S] fp32.

    The S entries of a head are those of its codes one after the other, see `score_rows`.
    """
    heads, products = planes.channels.shape[0], []
    for stage in planes.stages:
        table = stage.entries.view(torch.float32).view(heads, -1, 2)
        first = 0
        for part in stage.groups:
            codes, width, size = part.group.num_subspaces, part.planes_per_code, part.group.num_centroids
            entries = table[:, first : first + codes * width * size].unflatten(1, (codes, width, size))
            rows = query[..., part.first_plane : part.first_plane + codes * width, :].unflatten(3, (codes, width))
            products.append(torch.einsum("bhnmwc,hmwkc->bhnmk", rows, entries).flatten(3))
            first += codes * width * size
    return torch.cat(products, dim=-1)


def score_rows(planes: Planes) -> torch.Tensor:
    """Return where the entries of every plane's code start, [stages, D / 2] int32; -1 but for a code's first plane."""
    first_rows = torch.full((len(planes.stages), planes.num_planes), -1, dtype=torch.int32)
    start = 0
    for i, stage in enumerate(planes.stages):
        for part in stage.groups:
            group, last = part.group, part.first_plane + part.group.num_subspaces * part.planes_per_code
            rows = start + torch.arange(group.num_subspaces, dtype=torch.int32) * group.num_centroids
            first_rows[i, part.first_plane : last : part.planes_per_code] = rows
            start += group.num_subspaces * group.num_centroids
    return first_rows.to(planes.channels.device)


def table_scores(pages: torch.Tensor, planes: Planes, tables: torch.Tensor) -> torch.Tensor:
    """Return the scores [B, Hkv, N, 64 * P] of `score_tables` [B, Hkv, N, S] with the codes in `pages` [B, P, Hkv, bytes]."""
    batch, heads, count, size = tables.shape
    tokens = pages.shape[1] * PAGE_TOKENS
    flat = tables.reshape(-1)
    base = torch.arange(batch * heads * count, device=pages.device).view(batch, heads, count, 1, 1) * size
    total, start = flat.new_zeros(batch, heads, count, tokens), 0
    for stage in planes.stages:
        for part in stage.groups:
            group = part.group
            packed = pages[..., part.byte_offset : part.byte_offset + group.page_bytes].unflatten(-1, (group.num_subspaces, -1))
            codes = unpack_codes(packed, group.nbits).permute(0, 2, 3, 1, 4).flatten(3)[:, :, None]  # [B, Hkv, 1, M, T]
            rows = start + torch.arange(group.num_subspaces, device=pages.device)[:, None] * group.num_centroids
            total += flat[codes + (base + rows)].sum(3)
            start += group.num_subspaces * group.num_centroids
    return total
