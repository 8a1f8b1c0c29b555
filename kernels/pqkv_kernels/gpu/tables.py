"""Codebooks as the decode kernel looks them up: where codes lie in a page, and pairs of channels side by side. No kernel."""

from dataclasses import dataclass
from typing import Literal

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import code_parts
from pqkv_kernels.format.pairs import Planes, PlaneStage, planes_of
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tables import CodecTables

TableKind = Literal["float16", "float32"]
CHUNK_PLANES = 16
PART_WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """One codec for the decode kernel; BP planes, D / 2 of them true.

    Attributes
    ----------
    planes
        What the tables were made of.
    part_bytes
        First byte inside a page of the codes' parts of 8, 4, 2 and 1 bits, -1 where absent, [stages, 4, BP] int32.
    parts
        Ten bits for each stage, the first lowest: two for each width of `PART_WIDTHS`, which no plane has (0), some (1) or all
        (2), then whether one code stands for the whole vector.
    paired
        Whether every code of every stage stands for an even plane and the next: their entries lie side by side.
    rows
        First entry of every plane, [stages, Hkv, BP] int32, into `entries` of all stages one after the other. Entries of a
        plane follow each other by one, by two where planes are paired, or by BP where a code stands for the whole vector, whose
        planes lie together.
    entries
        Pairs of channels divided by their plane's `scale`: float16 pairs as [E] int32, or [E, 2] float32.
    scale
        Of every plane, [Hkv, D / 2] fp32: a power of two, so that float16 neither overflows nor loses small planes.
    pairs
        The rotary pair of every plane, or the number of pairs where it is not rotated, [Hkv, BP] int32; None as in `Planes`.
    """

    planes: Planes
    part_bytes: torch.Tensor
    parts: int
    paired: bool
    rows: torch.Tensor
    entries: torch.Tensor
    scale: torch.Tensor
    pairs: torch.Tensor | None

    @property
    def num_stages(self) -> int:
        """Additive stages."""
        return len(self.planes.stages)

    @property
    def num_planes(self) -> int:
        """Planes with those that pad them."""
        return int(self.part_bytes.shape[-1])


def device_tables(tables: CodecTables, kind: TableKind) -> DeviceTables:
    """Return `tables` for the decode kernel, made once and kept with them.

    Raises
    ------
    KernelError
        If subspaces cut pairs of channels: such codecs have no fast form.
    """
    key = f"device_tables.{kind}"
    if key not in tables.derived:
        planes = planes_of(tables)
        if planes is None:
            raise KernelError("subspaces cut pairs of channels; expected whole pairs in each: use the torch backend")
        tables.derived[key] = _device_tables(planes, kind)
    made: DeviceTables = tables.derived[key]
    return made


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Return `rows` [..., D / 2] with copies of the first plane up to a multiple of `CHUNK_PLANES`."""
    missing = -rows.shape[-1] % CHUNK_PLANES
    return torch.cat([rows, rows[..., :1].expand(*rows.shape[:-1], missing)], dim=-1).contiguous()


def _device_tables(planes: Planes, kind: TableKind) -> DeviceTables:
    paired = all(part.planes_per_code % 2 == 0 for stage in planes.stages for part in stage.groups)
    rows, entries, scale = _laid_out(planes, kind, paired)
    parts = [_part_bytes(stage, planes) for stage in planes.stages]
    part_bytes = padded(torch.stack(parts)).to(entries.device)
    pairs = None if planes.pairs is None else padded(planes.pairs).to(torch.int32)
    code = sum(_parts_code(stage, part) << (10 * i) for i, (stage, part) in enumerate(zip(planes.stages, parts, strict=True)))
    return DeviceTables(planes, part_bytes, code, paired, rows, entries, scale, pairs)


def _laid_out(planes: Planes, kind: TableKind, paired: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `rows`, `entries` and `scale` of `DeviceTables`."""
    heads, count = planes.channels.shape[:2]
    scale = _scales(planes)
    entries, rows, start = [], [], 0
    for stage in planes.stages:
        table = stage.entries.view(torch.float32).view(-1, 2) / scale[_plane_of_entry(stage, planes)][:, None]
        first = padded(stage.first_row[..., 0])
        if _is_whole(stage):
            table, first = _side_by_side(table.view(heads, count, -1, 2))
        elif paired:
            table, first = _interleaved(table, stage, first)
        else:
            table, first = _even_first(table, stage, heads)
        entries.append(table)
        rows.append(first + start)
        start += len(table)
    stored = _stored(torch.cat(entries), kind)
    return torch.stack(rows).to(torch.int32).contiguous(), stored, scale.view(heads, -1)


def _side_by_side(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay planes of a code of the whole vector together: entries [Hkv, D / 2, K, 2] to [Hkv * K * BP, 2], and first rows."""
    heads, _, size, _ = entries.shape
    table = padded(entries.permute(0, 2, 3, 1)).mT  # [Hkv, K, BP, 2]
    width = table.shape[2]
    steps = torch.arange(heads, device=table.device)[:, None] * (size * width)
    return table.reshape(-1, 2), steps + torch.arange(width, device=table.device)


def _interleaved(entries: torch.Tensor, stage: PlaneStage, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay entries [E, 2] of an even plane and of the next side by side, entry by entry, and return them and first rows."""
    tables, done = [], 0
    heads = len(first)
    per_head = entries.view(heads, -1, 2)
    for part in stage.groups:
        size = part.group.num_centroids
        count = part.group.num_subspaces * part.planes_per_code
        table = per_head[:, done : done + count * size].unflatten(1, (count // 2, 2, size))
        tables.append(table.transpose(2, 3).flatten(1, 3))
        done += count * size
    even = first[:, ::2]
    return torch.cat(tables, 1).reshape(-1, 2), torch.stack((even, even + 1), -1).flatten(1)


def _even_first(entries: torch.Tensor, stage: PlaneStage, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the tables of a head's even planes before those of the odd ones, and return entries [E, 2] and first rows.

    Lanes look up even planes together, then odd ones. Small tables of even planes should not lie in the same banks of memory,
    as they would with those of odd planes between them.
    """
    sizes = _sizes(stage).to(entries.device)
    order = torch.arange(len(sizes), device=sizes.device)
    order = torch.cat((order[::2], order[1::2]))
    starts = sizes.cumsum(0) - sizes
    laid = sizes[order].cumsum(0) - sizes[order]
    rows = (starts[order] - laid).repeat_interleave(sizes[order]) + torch.arange(int(sizes.sum()), device=sizes.device)
    first = torch.empty_like(laid).scatter_(0, order, laid)
    heads_first = torch.arange(heads, device=sizes.device)[:, None] * len(rows)
    return entries.view(heads, -1, 2)[:, rows].reshape(-1, 2), padded(heads_first + first)


def _stored(entries: torch.Tensor, kind: TableKind) -> torch.Tensor:
    """Return entries [E, 2], divided by scales, as `DeviceTables.entries`."""
    if kind == "float32":
        return entries.contiguous()
    return entries.half().contiguous().view(torch.int32).flatten()


def _scales(planes: Planes) -> torch.Tensor:
    """Return `DeviceTables.scale`, [Hkv * D / 2]: so large that no entry of any stage is above 1."""
    heads, device = planes.channels.shape[0], planes.channels.device
    largest = torch.zeros(heads * planes.num_planes, device=device)
    for stage in planes.stages:
        entries = stage.entries.view(torch.float32).view(-1, 2)
        largest = largest.scatter_reduce(0, _plane_of_entry(stage, planes), entries.abs().amax(-1), "amax")
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest))).clamp(max=2.0**126)


def _is_whole(stage: PlaneStage) -> bool:
    return len(stage.groups) == 1 and stage.groups[0].group.num_subspaces == 1


def _plane_of_entry(stage: PlaneStage, planes: Planes) -> torch.Tensor:
    """Return ``head * planes + plane`` of every entry of `stage`, [E] int64."""
    repeats = _sizes(stage).to(stage.entries.device).repeat(planes.channels.shape[0])
    return torch.arange(len(repeats), device=repeats.device).repeat_interleave(repeats)


def _sizes(stage: PlaneStage) -> torch.Tensor:
    """Return how many entries the table of every plane has, [D / 2] int64."""
    sizes = [[part.group.num_centroids] * (part.group.num_subspaces * part.planes_per_code) for part in stage.groups]
    return torch.tensor(sum(sizes, []))


def _part_bytes(stage: PlaneStage, planes: Planes) -> torch.Tensor:
    first_bytes = torch.full((len(PART_WIDTHS), planes.num_planes), -1, dtype=torch.int32)
    for part in stage.groups:
        group, start = part.group, part.byte_offset
        columns = part.first_plane + torch.arange(group.num_subspaces * part.planes_per_code)
        subspace = torch.arange(group.num_subspaces).repeat_interleave(part.planes_per_code)
        for width, low in code_parts(group.nbits):
            first = start + subspace * (8 * group.nbits) + 8 * low
            first_bytes[PART_WIDTHS.index(width), columns] = first.to(torch.int32)
    return first_bytes


def _parts_code(stage: PlaneStage, part_bytes: torch.Tensor) -> int:
    """Return the ten bits of `DeviceTables.parts` for one stage."""
    present = part_bytes >= 0
    code = sum((int(row.any()) + int(row.all())) << (2 * i) for i, row in enumerate(present))
    return code | (256 if _is_whole(stage) else 0)


def step_factors(angles: PageAngles, tables: DeviceTables) -> torch.Tensor:
    """Return cosines and sines inside a page as `key_operands` reads them, kept as long as the angles are the same.

    [Hkv, 2, BP / 8, 2, 16 words, 4 planes, 4 tokens], even planes and then odd ones, in the type of the tables' entries;
    float16 as words of 64 bits, one for the four tokens.
    """
    kept, key = tables.planes.steps, f"device.{tables.entries.dtype}"
    step, factors = kept.get(key, (None, None))
    if step is not angles.step[0] or factors is None:
        assert tables.pairs is not None  # angles are given only for keys coded before rotary embedding
        both = [torch.nn.functional.pad(t, (0, 1), value=v) for t, v in zip(angles.step, (1.0, 0.0), strict=True)]
        laid_out = torch.stack([t[:, tables.pairs.long()] for t in both])  # [2, 64, Hkv, BP]
        laid_out = laid_out.unflatten(-1, (-1, 4, 2)).unflatten(1, (16, 4))  # [2, 16, 4, Hkv, BP / 8, 4, 2]
        laid_out = laid_out.permute(3, 0, 4, 6, 1, 5, 2).contiguous()
        factors = laid_out if tables.entries.dtype == torch.float32 else laid_out.half().view(torch.int64)
        kept[key] = (angles.step[0], factors)
    return factors
