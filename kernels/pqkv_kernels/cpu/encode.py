"""Encoding in C++: vectors to code space, nearest centroids, the best of a few prototypes. CPU tensors only.

`NativeEncoder` puts the loops together; what none of them serves it leaves to the reference, step by step.
"""

import ctypes
from pathlib import Path

import torch

from pqkv_kernels.cpu.build import found_library, in_shares
from pqkv_kernels.cpu.structs import Struct, constants, structure
from pqkv_kernels.format.layout import CodeGroup
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables, channel_tables
from pqkv_kernels.reference.encode import Encoder
from pqkv_kernels.reference.nearest import augmented_centroids, check_points

NEAREST_SOURCE = Path(__file__).parent / "src" / "nearest.cpp"
SHORT_DIMS = constants(NEAREST_SOURCE, "kShortDims")  # channels of a point that stay in registers, too
MOST_TOP_K = max(constants(NEAREST_SOURCE, "kTopK"))  # of the nearest, which the loop keeps in registers
_NearestJob = structure(NEAREST_SOURCE, "NearestJob")


def can_search(points: torch.Tensor, count: int = 1) -> bool:
    """Return whether `native_top_k` serves `points`: on a CPU, not too many of the nearest, and the machine can compile it."""
    return points.device.type == "cpu" and count <= MOST_TOP_K and _nearest_library() is not None


def native_top_k(points: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` nearest of `centroids` [S, K, d] to `points` [S, N, d], where `can_search`; shapes are checked.

    Returns
    -------
    torch.Tensor
        [S, count, N] int64, nearest first, and of equally near ones the smaller index.
    """
    library = _nearest_library()
    assert library is not None  # or `can_search` would refuse
    num_subspaces, num_points, dim = points.shape
    points, augmented = points.detach().float().contiguous(), augmented_centroids(centroids.detach().float())
    codes = torch.empty(num_subspaces, count, num_points, dtype=torch.int64)
    job = _NearestJob(
        points=points.data_ptr(),
        augmented=augmented.data_ptr(),
        codes=codes.data_ptr(),
        num_points=num_points,
        num_centroids=centroids.shape[1],
        dim=dim,
        top_k=count,
    )
    if count == 1 and dim in SHORT_DIMS:
        in_shares(library.pqkv_nearest, job, num_subspaces)
    else:
        in_shares(library.pqkv_top_k, job, num_subspaces * -(-num_points // library.pqkv_block()))
    return codes


def _nearest_library() -> ctypes.CDLL | None:
    return found_library(NEAREST_SOURCE)


PARTS_SOURCE = Path(__file__).parent / "src" / "parts.cpp"
PART_DIMS = constants(PARTS_SOURCE, "kPartDims")  # channels of a part that the loop knows
_Part, _PartsJob = (structure(PARTS_SOURCE, name) for name in ("Part", "PartsJob"))


def can_choose(x: torch.Tensor, stage: tuple[CodeGroup, ...]) -> bool:
    """Return whether the loop serves vectors `x` with parts of `stage`: on a CPU that can compile it, for channels it knows."""
    return x.device.type == "cpu" and all(group.subspace_dim in PART_DIMS for group in stage) and _parts_library() is not None


def best_prototypes(
    x: torch.Tensor,
    candidates: torch.Tensor,
    table: torch.Tensor,
    stage: tuple[CodeGroup, ...],
    parts: tuple[torch.Tensor, ...],
) -> list[torch.Tensor]:
    """Return codes as `Encoder.best` does, of the same arguments, where `can_choose`."""
    library = _parts_library()
    assert library is not None  # or `can_choose` would refuse
    batch, heads, tokens, dim = x.shape
    x, candidates, table = x.detach().contiguous(), candidates.contiguous(), table.detach().contiguous()
    own, held = _parts(stage, parts)
    codes = torch.empty(batch, heads, 1 + len(own), tokens, dtype=torch.int64)
    tensors = {"x": x, "prototypes": table, "candidates": candidates, "codes": codes}
    pointers = {name: t.data_ptr() for name, t in tensors.items()} | {"parts": ctypes.addressof(own)}
    numbers = dict(rows=batch * heads, heads=heads, tokens=tokens, dim=dim)
    numbers |= dict(num_prototypes=table.shape[1], num_candidates=candidates.shape[2], num_parts=len(own))
    library.pqkv_new_cells.restype = ctypes.c_void_p
    cells = ctypes.c_void_p(library.pqkv_new_cells(ctypes.c_int64(heads * len(own))))
    try:
        job = _PartsJob(**pointers, cells=cells, **numbers)
        in_shares(library.pqkv_cells, job, heads * len(own))
        in_shares(library.pqkv_parts, job, batch * heads * -(-tokens // library.pqkv_block()))
    finally:
        library.pqkv_delete_cells(cells)
    assert held  # lived until here
    return list(codes.split([1, *(group.num_subspaces for group in stage)], dim=2))


def _parts(stage: tuple[CodeGroup, ...], tables: tuple[torch.Tensor, ...]) -> tuple[ctypes.Array[Struct], list[torch.Tensor]]:
    """Return a ``Part`` of the C++ source for every part, and the tensors that their addresses point into."""
    parts = (_Part * sum(group.num_subspaces for group in stage))()
    held, first, channel = [], 0, 0
    for group, table in zip(stage, tables, strict=True):
        augmented = augmented_centroids(table.detach().float())
        held.append(augmented)
        part = _Part(
            dim=group.subspace_dim,
            num_centroids=group.num_centroids,
            channel=channel,
            augmented=augmented.data_ptr(),
            head_stride=augmented.stride(0),
        )
        for m in range(first, first + group.num_subspaces):
            parts[m] = part  # a copy: the next one differs in two fields
            part.channel += group.subspace_dim
            part.augmented += augmented.stride(1) * augmented.element_size()
        first, channel = first + group.num_subspaces, channel + group.num_channels
    return parts, held


def _parts_library() -> ctypes.CDLL | None:
    return found_library(PARTS_SOURCE)


POINTS_SOURCE = Path(__file__).parent / "src" / "points.cpp"
_THREAD_TOKENS = 512  # less work than this is not worth waking another thread
_PointsJob = structure(POINTS_SOURCE, "PointsJob")


def can_map(x: torch.Tensor, tables: CodecTables) -> bool:
    """Return whether the loop serves `x`: on a CPU that can compile it, without gradient, and no map of whole vectors."""
    dense = tables.map is not None and tables.map.ndim == 3
    traced = x.requires_grad and torch.is_grad_enabled()
    return x.device.type == "cpu" and not dense and not traced and _points_library() is not None


def native_points(x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, T, D] fp32 of `x`, where `can_map`; without `angles` they are not rotated."""
    library = _points_library()
    assert library is not None  # or `can_map` would refuse
    x = x.detach().float()
    if x.stride(3) != 1:
        x = x.contiguous()
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape)
    channels = channel_tables(tables)
    held = {"x": x, "channels": channels.places, "factors": channels.factors, "out": out}
    numbers = dict(heads=heads, tokens=tokens, dim=dim, pairs=0, angle_stride=0)
    numbers |= dict(stride_b=x.stride(0), stride_h=x.stride(1), stride_t=x.stride(2))
    if angles is not None:
        held |= {name: t.float().contiguous() for name, t in zip(("cos", "sin"), angles, strict=True)}
        rows, _, pairs = held["cos"].shape
        numbers |= {"pairs": pairs, "angle_stride": tokens * pairs if rows > 1 else 0}
    job = _PointsJob(**{name: t.data_ptr() for name, t in held.items()}, **numbers)
    count = batch * heads * tokens
    in_shares(library.pqkv_points, job, count, max(1, count // _THREAD_TOKENS))
    return out


def _points_library() -> ctypes.CDLL | None:
    return found_library(POINTS_SOURCE)


class NativeEncoder(Encoder):
    """`Encoder` whose steps are C++ where a loop serves them; vectors lie on a CPU."""

    def nearest(self, points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        """Return the nearest centroids as the reference does, up to rounding of their distances."""
        check_points(points, centroids)
        return native_top_k(points, centroids, 1)[:, 0] if can_search(points) else super().nearest(points, centroids)

    def few(self, points: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
        """Return the nearest few as the reference does; of equally near ones the smaller index comes first."""
        check_points(points, centroids, count)
        return native_top_k(points, centroids, count) if can_search(points, count) else super().few(points, centroids, count)

    def code_space(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
        """Return code-space vectors as the reference does."""
        return native_points(x, tables, angles) if can_map(x, tables) else super().code_space(x, tables, angles)

    def best(
        self,
        x: torch.Tensor,
        few: torch.Tensor,
        table: torch.Tensor,
        stage: tuple[CodeGroup, ...],
        parts: tuple[torch.Tensor, ...],
    ) -> list[torch.Tensor]:
        """Return the codes of the best prototype and its parts as the reference does."""
        if can_choose(x, stage):
            return best_prototypes(x, few, table, stage, parts)
        return super().best(x, few, table, stage, parts)
