"""Codebooks laid out for reading codes: one table of complex numbers per pair of channels, with the map undone in it.

A pair of channels is a point of the plane, so rotary embedding is one complex factor. Where every subspace holds whole
pairs, undoing the map is linear within a pair: it is done to the centroids, once, and costs nothing per token. Knows codebooks
and bytes; no queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pqkv_kernels.format.layout import PAGE_TOKENS, CodeGroup
from pqkv_kernels.format.packing import unpack_codes, unpack_into
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables


@dataclass(frozen=True, slots=True)
class PlaneGroup:
    """Where the codes of one group lie and which planes they fill."""

    group: CodeGroup
    byte_offset: int
    first_plane: int

    @property
    def planes_per_code(self) -> int:
        """Pairs of channels that one code stands for."""
        return self.group.subspace_dim // 2


@dataclass(frozen=True, slots=True)
class PlaneStage:
    """One additive stage.

    `entries` [num_entries] int64 holds the bytes of complex64 numbers, `first_row` [Hkv, D / 2, 1] int32 where a plane's start.
    """

    groups: tuple[PlaneGroup, ...]
    entries: torch.Tensor
    first_row: torch.Tensor


@dataclass(frozen=True, slots=True)
class Planes:
    """A codec as planes.

    Attributes
    ----------
    stages
        Additive stages; the sum over them is the decoded vector.
    channels
        The two channels of every plane in the space in which the vectors are scored, [Hkv, D / 2, 2] int64.
    pairs
        The rotary pair of every plane, or the number of pairs where it is not rotated, [Hkv, D / 2] int64; None where keys
        are coded as the cache is given them.
    steps
        What a reader keeps of the angles inside a page, which are the same for all pages.
    derived
        Other forms of the tables that a reader has made and keeps with them.
    """

    stages: tuple[PlaneStage, ...]
    channels: torch.Tensor
    pairs: torch.Tensor | None
    steps: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, compare=False, repr=False)
    derived: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_planes(self) -> int:
        """Pairs of channels per head."""
        return int(self.channels.shape[1])


def planes_of(tables: CodecTables) -> Planes | None:
    """Return `tables` as planes, made once and kept with them; None where subspaces cut pairs.

    With `tables.rotary` the planes decode to unrotated pairs in model space; without, to code space.
    """
    if "planes" not in tables.derived:
        tables.derived["planes"] = _planes(tables)
    made: Planes | None = tables.derived["planes"]
    return made


def cut_pairs(codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
    """Return in which layer's keys or values a subspace holds half of a pair of channels, in words; None where none does."""
    for layer, tables in enumerate(codecs):
        for side, side_tables in zip(("keys", "values"), tables, strict=True):
            if planes_of(side_tables) is None:
                return f"the subspaces of the {side} of coded layer {layer} cut pairs of channels"
    return None


def read_planes(
    pages: torch.Tensor, planes: Planes, index: torch.Tensor, values: torch.Tensor, spare: torch.Tensor
) -> torch.Tensor:
    """Decode `pages` [N, N', Hkv, page_bytes] into a view [N, N', Hkv, D / 2, 64] complex64 of `values`.

    `index` (int32), `values` and `spare` (int64) are buffers of at least as many elements; `spare` serves additive stages.
    """
    shape = (*pages.shape[:3], planes.num_planes, PAGE_TOKENS)
    count = pages.shape[0] * pages.shape[1] * pages.shape[2] * planes.num_planes * PAGE_TOKENS
    rows = index[:count].view(shape)
    total = values[:count]
    for i, stage in enumerate(planes.stages):
        for part in stage.groups:
            _read_codes(pages, part, rows)
        rows += stage.first_row
        target = total if i == 0 else spare[:count]
        torch.index_select(stage.entries, 0, rows.view(-1), out=target)
        if i:
            total.view(torch.complex64).add_(target.view(torch.complex64))
    return total.view(torch.complex64).view(shape)


def _read_codes(pages: torch.Tensor, part: PlaneGroup, rows: torch.Tensor) -> None:
    group, repeat = part.group, part.planes_per_code
    packed = pages[..., part.byte_offset : part.byte_offset + group.page_bytes].unflatten(-1, (group.num_subspaces, -1))
    target = rows[..., part.first_plane : part.first_plane + group.num_subspaces * repeat, :]
    if repeat == 1:
        unpack_into(target, packed, group.nbits)
    else:
        codes = packed if group.nbits == 8 else unpack_codes(packed, group.nbits)
        target.unflatten(-2, (group.num_subspaces, repeat)).copy_(codes[..., None, :])


def _planes(tables: CodecTables) -> Planes | None:
    layout = tables.layout
    if any(group.subspace_dim % 2 for _, _, group, _, _ in layout.spans()):
        return None
    device, dim = tables.codebooks[0][0].device, layout.head_dim
    channels = torch.arange(dim, device=device).expand(tables.num_heads, dim)
    if tables.permutation is not None:
        channels = tables.permutation.long()
    channels = channels.unflatten(-1, (dim // 2, 2))
    pairs = inverse = None
    if tables.rotary is not None:
        block = _blocks(tables, channels)
        if block is None:
            return None
        pairs = block.clamp(max=tables.rotary.num_pairs)
        inverse = _inverse(tables, channels, block)
    stages = tuple(_stage(tables, i, inverse) for i in range(len(layout.stages)))
    return Planes(stages, channels, pairs)


def _blocks(tables: CodecTables, channels: torch.Tensor) -> torch.Tensor | None:
    """Return which block of two channels every plane is, [Hkv, D / 2]; None unless each is one, first channel first."""
    dim = tables.layout.head_dim
    assert tables.rotary is not None  # asked only of keys coded before rotary embedding
    if (dim - tables.rotary.rotary_dim) % 2:
        return None
    order = torch.tensor(tables.rotary.blocks(dim), device=channels.device).flatten().argsort()
    place = order[channels]  # 2 * block, plus 1 for the second channel
    block = place[..., 0] // 2
    whole = (place[..., 0] == 2 * block) & (place[..., 1] == 2 * block + 1)
    return block if bool(whole.all()) else None


def _inverse(tables: CodecTables, channels: torch.Tensor, block: torch.Tensor) -> torch.Tensor | None:
    """Return the matrix [Hkv, D / 2, 2, 2] fp32 that undoes the map on every plane."""
    if tables.map is None:
        return None
    if tables.inverse is None:
        heads = torch.arange(tables.num_heads, device=channels.device)[:, None, None]
        return torch.diag_embed(1 / tables.map[heads, channels])
    return tables.inverse.gather(1, block[:, :, None, None].expand(-1, -1, 2, 2))


def _stage(tables: CodecTables, index: int, inverse: torch.Tensor | None) -> PlaneStage:
    groups, entries, first, offset = [], [], [], 0
    for stage, i, group, byte_offset, channel in tables.layout.spans():
        if stage != index:
            continue
        table = tables.codebooks[stage][i].float().unflatten(-1, (-1, 2)).transpose(2, 3).flatten(1, 2)  # [Hkv, planes, K, 2]
        if inverse is not None:
            table = table @ inverse[:, channel // 2 : channel // 2 + table.shape[1]].mT
        groups.append(PlaneGroup(group, byte_offset, channel // 2))
        entries.append(table.flatten(1, 2))
        first.append(offset + torch.arange(table.shape[1], device=table.device) * group.num_centroids)
        offset += table.shape[1] * group.num_centroids
    flat = torch.cat(entries, dim=1).contiguous()  # [Hkv, entries, 2]
    rows = torch.cat(first) + torch.arange(len(flat), device=flat.device)[:, None] * offset
    return PlaneStage(tuple(groups), flat.view(torch.int64).flatten(), rows.to(torch.int32)[..., None])


def plane_factors(angles: Angles, planes: Planes) -> torch.Tensor:
    """Return complex factors [..., Hkv, N, D / 2] of `angles` [..., N, R / 2]: one where a plane is not rotated."""
    assert planes.pairs is not None  # angles are given only for keys coded before rotary embedding
    factors = torch.nn.functional.pad(torch.complex(*angles), (0, 1), value=1.0)
    return (
        factors[..., None, :, :]
        .expand(*factors.shape[:-2], len(planes.pairs), -1, -1)
        .gather(-1, planes.pairs[:, None].expand(*factors.shape[:-2], -1, factors.shape[-2], -1))
    )


def step_factors(angles: PageAngles, planes: Planes) -> torch.Tensor:
    """Return the factors [Hkv, D / 2, 64] inside a page, kept with the planes as long as the angles are the same."""
    cos, factors = planes.steps.get("kept", (None, None))
    if cos is not angles.step[0] or factors is None:
        factors = plane_factors(angles.step, planes).mT.contiguous()
        planes.steps["kept"] = (angles.step[0], factors)
    return factors
