"""Look-up tables for codes of four bits, small enough for registers: sixteen bytes for each component of a plane.

Knows planes; no kernel. `triton_nibbles` reads them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import code_parts
from pqkv_kernels.format.pairs import Planes, PlaneStage, planes_of
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tables import CodecTables

SUBNORMAL = 2.0**24
"""By how much a float16 whose bits are a small number is smaller than the number."""
_ENTRIES = 16
_LARGEST_BYTE, _LARGEST_SUM = 127, 255
_LARGEST_NUMBER = 1023  # which a subnormal float16 holds exactly


@dataclass(frozen=True, slots=True)
class NibbleTables:
    """Tables of bytes whose sums over the stages are bytes, too.

    Attributes
    ----------
    entries
        [Hkv, stages, D / 2, 4] int64: bytes for the codes 0 to 7 and 8 to 15 of the first component, then of the second.
    offset
        What is to be added to a plane's sums, [Hkv, D / 2, 2] fp32, whole numbers from -1,023 to 1,023.
    step
        What one is worth, [Hkv, D / 2] fp32.
    """

    entries: torch.Tensor
    offset: torch.Tensor
    step: torch.Tensor


def planes_per_code(planes: Planes) -> int:
    """Return how many planes each code stands for where all have four bits and all stages are alike, else 0."""
    forms = {(part.group.nbits, part.planes_per_code) for stage in planes.stages for part in stage.groups}
    alike = len(forms) == 1 and all(len(stage.groups) == 1 for stage in planes.stages)
    nbits, count = forms.pop()
    return count if alike and nbits == 4 else 0


def nibble_tables(planes: Planes) -> NibbleTables:
    """Return tables for `planes` whose codes have four bits, in the smallest steps that bytes and their sums allow."""
    rows = torch.stack([stage.first_row for stage in planes.stages]).long()  # [stages, Hkv, D / 2, 1]
    rows = rows + torch.arange(_ENTRIES, device=rows.device)
    values = torch.stack(
        [stage.entries.view(torch.float32).view(-1, 2)[at] for stage, at in zip(planes.stages, rows, strict=True)]
    )  # [stages, Hkv, D / 2, 16, 2]
    step = _steps(values)
    numbers = (values / step[..., None, None]).round()
    lowest = numbers.amin(3)
    found = (numbers - lowest[:, :, :, None]).to(torch.uint8)
    entries = found.permute(1, 0, 2, 4, 3).contiguous().view(torch.int64).flatten(-2)
    return NibbleTables(entries, lowest.sum(0), step)


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return `NibbleTables.step`; rounding may widen the range of every stage by one, and move what it adds by a half."""
    stages = len(values)
    ranges = values.amax(3) - values.amin(3)
    widest = ranges.amax((0, -1)) / (_LARGEST_BYTE - 1)
    summed = ranges.sum(0).amax(-1) / (_LARGEST_SUM - stages)
    farthest = values.abs().amax((3, 4)).sum(0) / (_LARGEST_NUMBER - stages)
    return torch.stack((widest, summed, farthest)).amax(0).clamp(min=torch.finfo(torch.float32).tiny)


TableType = Literal["float16", "float32", "int8"]
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
    nibbles
        How many planes every code stands for where tables are `NibbleTables`, else 0.
    rows
        First entry of every plane, [stages, Hkv, BP] int32, into `entries` of all stages one after the other. Entries of a
        plane follow each other by one, by two where planes are paired, or by BP where a code stands for the whole vector, whose
        planes lie together. Of `NibbleTables` their offset instead, [1, Hkv, BP]: two float16, smaller by ``2 ** 24``.
    entries
        Pairs of channels divided by their plane's `scale`: float16 pairs as [E] int32, [E, 2] float32, or pairs of bytes, of
        numbers from -127 to 127 with 128 added, as [E] int16. Of `NibbleTables` [Hkv, stages, BP, 4] int64.
    scale
        Of every plane, [Hkv, D / 2] fp32: a power of two, so that float16 neither overflows nor loses small planes; for bytes a
        127th of the largest component, or the step of `NibbleTables`.
    pairs
        The rotary pair of every plane, or the number of pairs where it is not rotated, [Hkv, BP] int32; None as in `Planes`.
    """

    planes: Planes
    part_bytes: torch.Tensor
    parts: int
    paired: bool
    nibbles: int
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


def device_tables(tables: CodecTables, table_type: TableType) -> DeviceTables:
    """Return `tables` for the decode kernel, made once and kept with them.

    Raises
    ------
    KernelError
        If subspaces cut pairs of channels: such codecs have no fast form.
    """
    key = f"device_tables.{table_type}"
    if key not in tables.derived:
        planes = planes_of(tables)
        if planes is None:
            raise KernelError("subspaces cut pairs of channels; expected whole pairs in each: use the torch backend")
        tables.derived[key] = _device_tables(planes, table_type)
    found: DeviceTables = tables.derived[key]
    return found


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Return `rows` [..., D / 2] with copies of the first plane up to a multiple of `CHUNK_PLANES`."""
    missing = -rows.shape[-1] % CHUNK_PLANES
    return torch.cat([rows, rows[..., :1].expand(*rows.shape[:-1], missing)], dim=-1).contiguous()


def _device_tables(planes: Planes, table_type: TableType) -> DeviceTables:
    paired = all(part.planes_per_code % 2 == 0 for stage in planes.stages for part in stage.groups)
    nibbles = planes_per_code(planes) if table_type == "int8" else 0
    rows, entries, scale = _in_registers(planes) if nibbles else _in_memory(planes, table_type, paired)
    parts = [_part_bytes(stage, planes) for stage in planes.stages]
    part_bytes = padded(torch.stack(parts)).to(entries.device)
    pairs = None if planes.pairs is None else padded(planes.pairs).to(torch.int32)
    code = sum(_parts_code(stage, found) << (10 * i) for i, (stage, found) in enumerate(zip(planes.stages, parts, strict=True)))
    return DeviceTables(planes, part_bytes, code, paired, nibbles, rows, entries, scale, pairs)


def _in_registers(planes: Planes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `rows`, `entries` and `scale` of `NibbleTables`."""
    found = nibble_tables(planes)
    offset = (found.offset / SUBNORMAL).half().view(torch.int32)[None, ..., 0]
    return padded(offset), padded(found.entries.mT).mT.contiguous(), found.step


def _in_memory(planes: Planes, table_type: TableType, paired: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `rows`, `entries` and `scale` of tables of any other form."""
    heads, count = planes.channels.shape[:2]
    scale = _scales(planes, table_type)
    entries, rows, start = [], [], 0
    for stage in planes.stages:
        found = stage.entries.view(torch.float32).view(-1, 2) / scale[_plane_of_entry(stage, planes)][:, None]
        first = padded(stage.first_row[..., 0])
        if _is_whole(stage):
            found, first = _side_by_side(found.view(heads, count, -1, 2))
        elif paired:
            found, first = _interleaved(found, stage, first)
        else:
            found, first = _even_first(found, stage, heads)
        entries.append(found)
        rows.append(first + start)
        start += len(found)
    table = _stored(torch.cat(entries), table_type)
    return torch.stack(rows).to(torch.int32).contiguous(), table, scale.view(heads, -1)


def _side_by_side(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay planes of a code of the whole vector together: entries [Hkv, D / 2, K, 2] to [Hkv * K * BP, 2], and first rows."""
    heads, _, size, _ = entries.shape
    found = padded(entries.permute(0, 2, 3, 1)).mT  # [Hkv, K, BP, 2]
    width = found.shape[2]
    steps = torch.arange(heads, device=found.device)[:, None] * (size * width)
    return found.reshape(-1, 2), steps + torch.arange(width, device=found.device)


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


def _stored(entries: torch.Tensor, table_type: TableType) -> torch.Tensor:
    """Return entries [E, 2], divided by scales, as `DeviceTables.entries`."""
    if table_type == "float32":
        return entries.contiguous()
    if table_type == "float16":
        return entries.half().contiguous().view(torch.int32).flatten()
    return (entries.round() + 128).to(torch.uint8).contiguous().view(torch.int16).flatten()


def _scales(planes: Planes, table_type: TableType) -> torch.Tensor:
    """Return `DeviceTables.scale`, [Hkv * D / 2]: so large that no entry of any stage is above 1, or above 127."""
    heads, device = planes.channels.shape[0], planes.channels.device
    largest = torch.zeros(heads * planes.num_planes, device=device)
    for stage in planes.stages:
        found = stage.entries.view(torch.float32).view(-1, 2)
        largest = largest.scatter_reduce(0, _plane_of_entry(stage, planes), found.abs().amax(-1), "amax")
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return largest / 127 if table_type == "int8" else torch.exp2(torch.ceil(torch.log2(largest))).clamp(max=2.0**126)


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
    found = torch.full((len(PART_WIDTHS), planes.num_planes), -1, dtype=torch.int32)
    for part in stage.groups:
        group, start = part.group, part.byte_offset
        columns = part.first_plane + torch.arange(group.num_subspaces * part.planes_per_code)
        subspace = torch.arange(group.num_subspaces).repeat_interleave(part.planes_per_code)
        for width, low in code_parts(group.nbits):
            first = start + subspace * (8 * group.nbits) + 8 * low
            found[PART_WIDTHS.index(width), columns] = first.to(torch.int32)
    return found


def _parts_code(stage: PlaneStage, part_bytes: torch.Tensor) -> int:
    """Return the ten bits of `DeviceTables.parts` for one stage."""
    present = part_bytes >= 0
    found = sum((int(row.any()) + int(row.all())) << (2 * i) for i, row in enumerate(present))
    return found | (256 if _is_whole(stage) else 0)


FACTOR = 2.0**14
"""By how much they are larger where they meet numbers smaller by `SUBNORMAL`: products are neither subnormal nor too large."""


def step_factors(angles: PageAngles, tables: DeviceTables) -> torch.Tensor:
    """Return cosines and sines inside a page as `key_operands` reads them, kept as long as the angles are the same.

    [Hkv, 2, BP / 8, 2, 16 words, 4 planes, 4 tokens], even planes and then odd ones, in the type of the tables' entries;
    float16 as words of 64 bits, one for the four tokens; times `FACTOR` for `NibbleTables`.
    """
    kept, key = tables.planes.steps, f"device.{tables.entries.dtype}"
    step, factors = kept.get(key, (None, None))
    if step is not angles.step[0] or factors is None:
        assert tables.pairs is not None  # angles are given only for keys coded before rotary embedding
        both = [torch.nn.functional.pad(t, (0, 1), value=v) for t, v in zip(angles.step, (1.0, 0.0), strict=True)]
        found = torch.stack([t[:, tables.pairs.long()] for t in both])  # [2, 64, Hkv, BP]
        found = found.unflatten(-1, (-1, 4, 2)).unflatten(1, (16, 4))  # [2, 16, 4, Hkv, BP / 8, 4, 2]
        found = found.permute(3, 0, 4, 6, 1, 5, 2).contiguous()
        found = found * FACTOR if tables.nibbles else found
        factors = found if tables.entries.dtype == torch.float32 else found.half().view(torch.int64)
        kept[key] = (angles.step[0], factors)
    return factors
