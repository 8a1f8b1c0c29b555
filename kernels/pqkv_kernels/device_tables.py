"""Planes as a GPU kernel reads them: where each plane's codes lie in a page, and tables of 4 or 8 bytes per pair of channels.

Knows tensors; no kernel.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import code_parts
from pqkv_kernels.planes import Planes, PlaneStage, planes_of
from pqkv_kernels.tables import CodecTables

TableType = Literal["float16", "float32"]
PART_WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """One codec for the decode kernel.

    Attributes
    ----------
    planes
        What the tables were made of.
    part_bytes
        First byte inside a page of the codes' parts of 8, 4, 2 and 1 bits, -1 where absent, [stages, 4, D / 2] int32.
    widths
        Which parts occur at all, e.g. ``(8, 2)``.
    first_row
        First entry of every plane, [stages, Hkv, D / 2] int32, into `entries` of all stages one after the other.
    entries
        Pairs of channels divided by their plane's `scale`: float16 pairs as [E] int32, or [E, 2] float32.
    scale
        A power of two per plane, so that float16 neither overflows nor loses small planes, [Hkv, D / 2] fp32.
    """

    planes: Planes
    part_bytes: torch.Tensor
    widths: tuple[int, ...]
    first_row: torch.Tensor
    entries: torch.Tensor
    scale: torch.Tensor

    @property
    def num_stages(self) -> int:
        """Additive stages."""
        return len(self.planes.stages)


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


def _device_tables(planes: Planes, table_type: TableType) -> DeviceTables:
    pairs = [stage.entries.view(torch.float32).view(-1, 2) for stage in planes.stages]
    plane_of_entry = [_plane_of_entry(stage, planes) for stage in planes.stages]
    heads = planes.channels.shape[0]
    largest = torch.zeros(heads * planes.num_planes, device=pairs[0].device)
    for found, plane in zip(pairs, plane_of_entry, strict=True):
        largest = largest.scatter_reduce(0, plane, found.abs().amax(-1), "amax")
    scale = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=torch.finfo(torch.float32).tiny)))).clamp(max=2.0**126)
    scaled = torch.cat([found / scale[plane][:, None] for found, plane in zip(pairs, plane_of_entry, strict=True)])
    entries = scaled.half().contiguous().view(torch.int32).flatten() if table_type == "float16" else scaled.contiguous()
    offsets = torch.tensor([0, *[len(p) for p in pairs[:-1]]]).cumsum(0).tolist()
    rows = [stage.first_row[..., 0] + offset for stage, offset in zip(planes.stages, offsets, strict=True)]
    part_bytes = torch.stack([_part_bytes(stage, planes) for stage in planes.stages])
    widths = tuple(w for i, w in enumerate(PART_WIDTHS) if bool((part_bytes[:, i] >= 0).any()))
    device = entries.device
    first_row = torch.stack(rows).to(torch.int32).contiguous()
    return DeviceTables(planes, part_bytes.to(device), widths, first_row, entries, scale.view(heads, -1))


def _plane_of_entry(stage: PlaneStage, planes: Planes) -> torch.Tensor:
    """Return ``head * planes + plane`` of every entry of `stage`, [E] int64."""
    sizes = [part.group.num_centroids for part in stage.groups for _ in range(part.group.num_subspaces * part.planes_per_code)]
    heads = planes.channels.shape[0]
    repeats = torch.tensor(sizes * heads, device=stage.entries.device)
    return torch.arange(len(repeats), device=repeats.device).repeat_interleave(repeats)


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
