"""Codebooks as the C++ kernel of attention reads them: rows of `Group` of its source. CPU tensors only."""

import ctypes
from dataclasses import dataclass

import torch

from pqkv_kernels.planes import PlaneGroup, Planes

_WIDE_PLANES = 8  # codes of so many planes are read row by row
_LANES = 16  # rows are filled up to a multiple of
_FEWEST_BYTES = 128  # entries that one instruction looks up


@dataclass(frozen=True, slots=True)
class NativeTables:
    """Groups of one codec as the kernel reads them, [G, 9] int64, and the tensors whose addresses they hold."""

    groups: torch.Tensor
    held: tuple[torch.Tensor, ...]


def native_tables(planes: Planes, library: ctypes.CDLL) -> NativeTables:
    """Return the tables of `planes` in the form that `library` was built to read, made once and kept with them."""
    in_bytes = bool(ctypes.c_int.in_dll(library, "pqkv_byte_tables").value)
    key = "native.bytes" if in_bytes else "native.floats"
    found = planes.derived.get(key)
    if not isinstance(found, NativeTables):
        found = planes.derived[key] = _tables(planes, in_bytes)
    return found


def byte_planes(table: torch.Tensor) -> torch.Tensor:
    """Return the upper three bytes of `table` [..., K, 2] fp32, lowest first: [..., 2, 3, K or 128] uint8.

    Floats are rounded to sixteen significant bits, to even; those of float16 keep their value.
    """
    bits = table.contiguous().view(torch.int32)
    rounded = bits + 0x7F + ((bits >> 8) & 1)
    upper = rounded.contiguous().view(torch.uint8).unflatten(-1, (2, 4))[..., 1:]  # [..., K, 2, 3], little-endian
    missing = max(0, _FEWEST_BYTES - table.shape[-2])
    return torch.nn.functional.pad(upper.movedim(-3, -1), (0, missing)).contiguous()


def _tables(planes: Planes, in_bytes: bool) -> NativeTables:
    rows, held = [], []
    for stage in planes.stages:
        entries = stage.entries.view(torch.float32).view(planes.channels.shape[0], -1, 2)
        first = 0
        for part in stage.groups:
            count = part.group.num_subspaces * part.planes_per_code * part.group.num_centroids
            table, is_wide = _table(part, entries[:, first : first + count], in_bytes)
            held.append(table)
            rows.append(_group_row(part, table, is_wide))
            first += count
    return NativeTables(torch.tensor(rows), tuple(held))


def _table(part: PlaneGroup, entries: torch.Tensor, in_bytes: bool) -> tuple[torch.Tensor, bool]:
    """Return `entries` [Hkv, M * planes * K, 2] as they are read, plane after plane, and whether codes are of many planes."""
    width, num_centroids = part.planes_per_code, part.group.num_centroids
    table = entries.unflatten(1, (-1, num_centroids))  # [Hkv, M * planes, K, 2]
    if width >= _WIDE_PLANES:  # [Hkv, M, K, 2, planes and zeros]
        rows = table.unflatten(1, (-1, width)).permute(0, 1, 3, 4, 2)
        return torch.nn.functional.pad(rows, (0, -width % _LANES)).contiguous(), True
    return byte_planes(table) if in_bytes else table.contiguous(), False


def _group_row(part: PlaneGroup, table: torch.Tensor, is_wide: bool) -> list[int]:
    group = part.group
    head_bytes = table.stride(0) * table.element_size()
    place = [part.byte_offset, group.num_subspaces, group.nbits, part.planes_per_code, part.first_plane]
    return [*place, table.data_ptr(), head_bytes, head_bytes // group.num_subspaces, int(is_wide)]
