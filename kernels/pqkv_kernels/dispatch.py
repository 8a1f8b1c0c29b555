"""Which implementation of the operations runs, and why. The only place that chooses.

A backend that is asked for by name runs or raises: nothing falls back silently. ``auto`` takes the best that can run and says
which and why. ``native`` is C++ for the few queries of a decode step on a CPU; longer chunks, gradients and keys turned token
by token are torch's there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch

from pqkv_kernels.cpu.attention import can_add, can_attend, native_add_exact, native_attention
from pqkv_kernels.cpu.build import found_library, native_obstacle
from pqkv_kernels.cpu.centroid_sums import SOURCE as CENTROIDS_SOURCE
from pqkv_kernels.cpu.centroid_sums import native_centroid_sums
from pqkv_kernels.cpu.encode import NEAREST_SOURCE, NativeEncoder
from pqkv_kernels.cpu.torch_attention import plane_attention
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.checks import check_attention
from pqkv_kernels.format.layout import PAGE_TOKENS, CodeLayout
from pqkv_kernels.format.pairs import planes_of
from pqkv_kernels.format.rotary import Angles, PageAngles, page_range
from pqkv_kernels.format.tables import CodecTables, channel_tables
from pqkv_kernels.reference import centroid_sums as reference_sums
from pqkv_kernels.reference.attention import ExactTokens, Part, add_exact, code_attention, code_queries, leave_code_space, merge
from pqkv_kernels.reference.encode import REFERENCE, Codebooks, Encoder

Backend = Literal["torch", "native", "triton"]
BackendRequest = Literal["auto", "torch", "native", "triton"]
_NATIVE = NativeEncoder()


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that will run, and the reason in words."""

    name: Backend
    reason: str


def choose_backend(
    requested: BackendRequest, device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]] = ()
) -> Choice:
    """Return what runs on `device` for the key and value tables of `codecs`.

    Raises
    ------
    KernelError
        If the backend is unknown, or was asked for by name and cannot run there.
    """
    if requested not in get_args(BackendRequest):
        raise KernelError(f"backend is {requested!r}; expected one of {', '.join(get_args(BackendRequest))}")
    if requested == "torch":
        return Choice("torch", "asked for by name")
    if requested == "native" or (requested == "auto" and device.type == "cpu"):
        obstacle = _native_obstacle(device, codecs)
    else:
        obstacle = _triton_obstacle(device, codecs)
    if requested != "auto":
        if obstacle is not None:
            raise KernelError(f"the {requested} backend was asked for, but {obstacle}; choose torch or auto")
        return Choice(requested, "asked for by name")
    if obstacle is not None:
        return Choice("torch", obstacle)
    if device.type == "cpu":
        return Choice("native", "the device is cpu and a C++ compiler has built the kernel for it")
    return Choice("triton", f"the device is {device.type} and Triton is installed")


def _native_obstacle(device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
    """Return why the C++ kernel cannot run, or None."""
    if device.type != "cpu":
        return f"the device is {device.type} and the native backend runs on CPUs"
    return native_obstacle() or _cut_pairs(codecs)


def _triton_obstacle(device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
    """Return why the Triton kernels cannot run, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'pqkv[gpu]')"
    if device.type != "cuda" and not _triton_attention().is_interpreted():
        return f"the device is {device.type} and Triton's kernels need a CUDA GPU"
    return _cut_pairs(codecs)


def _cut_pairs(codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
    for layer, tables in enumerate(codecs):
        for side, side_tables in zip(("keys", "values"), tables, strict=True):
            if planes_of(side_tables) is None:
                return f"the subspaces of the {side} of coded layer {layer} cut pairs of channels"
    return None


def _triton_attention() -> ModuleType:
    # Imported when it is first needed: Triton is optional, and nobody on a CPU should wait for it.
    return import_module("pqkv_kernels.gpu.attention")


def prepare_tables(backend: Backend, tables: CodecTables) -> None:
    """Make what `backend` reads of `tables`, once and on the present stream; a step that finds it made waits for nothing."""
    if tables.permutation is not None:
        tables.inverse_permutation()
    if backend == "triton":
        _triton_attention().prepare(tables)
        channel_tables(tables)
    else:
        planes_of(tables)


def attend_codes(
    backend: Backend,
    query: torch.Tensor,
    key_pages: Sequence[torch.Tensor],
    value_pages: Sequence[torch.Tensor],
    key_tables: CodecTables,
    value_tables: CodecTables,
    spans: torch.Tensor,
    scaling: float,
    angles: Angles | PageAngles | None = None,
    softcap: float | None = None,
) -> Part:
    """Attend with model-space queries to coded tokens, all of which precede all queries.

    Parameters
    ----------
    backend
        As `choose_backend` names it.
    query
        [B, H, Tq, D], any float dtype.
    key_pages, value_pages
        Slabs of pages in order, each [B, P, Hkv, page_bytes] uint8.
    spans, scaling, angles, softcap
        As `pqkv_kernels.reference.attention.code_attention` takes them.

    Returns
    -------
    tuple
        Output in model space [B, H, Tq, D] fp32 and log-sum-exp [B, H, Tq] fp32.

    Raises
    ------
    KernelError
        If shapes, dtypes or devices do not fit, or the backend cannot run this.
    """
    check_attention(query, key_pages, value_pages, key_tables, value_tables, spans, angles)
    if not query.numel() or not any(slab.shape[1] for slab in key_pages):
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    coded = code_queries(query, key_tables)
    if backend == "triton":
        attend = _triton_attention().triton_attention
        output, lse = attend(coded, key_pages, value_pages, key_tables, value_tables, spans, scaling, angles, softcap)
        return leave_code_space(output, value_tables), lse.flatten(1, 2)
    keys, values = planes_of(key_tables), planes_of(value_tables)
    if backend == "native" and keys is not None and values is not None and can_attend(coded, angles):
        assert not isinstance(angles, tuple)  # or `can_attend` would refuse
        output, lse = native_attention(coded, key_pages, value_pages, keys, values, spans, scaling, angles, softcap)
    elif keys is not None and values is not None:
        output, lse = plane_attention(coded, key_pages, value_pages, keys, values, spans, scaling, angles, softcap)
    else:
        parts = [
            code_attention(coded, k, v, key_tables, value_tables, spans - PAGE_TOKENS * start, scaling, turned, softcap)
            for start, k, v, turned in _slabs(key_pages, value_pages, angles)
        ]
        output, lse = merge(parts) if parts else (torch.zeros_like(coded), coded.new_full(coded.shape[:-1], -torch.inf))
    return leave_code_space(output, value_tables), lse.flatten(1, 2)


def attend_exact(
    backend: Backend, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None = None
) -> Part:
    """Add exact tokens to what `attend_codes` returned, as `pqkv_kernels.reference.attention.add_exact` does."""
    if backend == "native" and can_add(query, exact):
        return native_add_exact(coded, query, exact, scaling, softcap)
    return add_exact(coded, query, exact, scaling, softcap)


def encode_pages(backend: Backend, x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode whole pages of vectors, as `pqkv_kernels.reference.encode.Encoder.encode` does.

    Raises
    ------
    KernelError
        If shapes do not fit or angles are missing.
    """
    if backend != "triton":
        return (_NATIVE if backend == "native" else REFERENCE).encode(x, tables, angles)
    module = import_module("pqkv_kernels.gpu.encode")
    module.check_encode(x, tables, angles)
    pages: torch.Tensor = module.triton_encode(x, tables, angles)
    return pages


def fastest_encoder(device: torch.device) -> Encoder:
    """Return the steps of encoding for tensors on `device` that nobody chose a backend for: of fits, studies and checks.

    They are C++ on a CPU with a compiler and the reference's elsewhere; codes differ at most where rounding decides.
    """
    return _NATIVE if device.type == "cpu" and found_library(NEAREST_SOURCE) is not None else REFERENCE


def nearest_centroids(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the nearest of `centroids` [S, K, d] to `points` [S, N, d], [S, N] int64, by `fastest_encoder`."""
    return fastest_encoder(points.device).nearest(points, centroids)


def to_code_space(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True) -> torch.Tensor:
    """Return what `Encoder.to_code_space` does, by `fastest_encoder`."""
    return fastest_encoder(x.device).to_code_space(x, tables, angles, rotated=rotated)


def quantize(x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
    """Return what `Encoder.quantize` does, by `fastest_encoder`."""
    return fastest_encoder(x.device).quantize(x, layout, codebooks)


def round_trip(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True) -> torch.Tensor:
    """Return what `Encoder.round_trip` does, by `fastest_encoder`."""
    return fastest_encoder(x.device).round_trip(x, tables, angles, rotated=rotated)


def centroid_sums(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `pqkv_kernels.reference.centroid_sums.centroid_sums` does, in C++ on a CPU with a compiler."""
    if points.device.type == "cpu" and found_library(CENTROIDS_SOURCE) is not None:
        return native_centroid_sums(points, weights, centroids, codes)
    return reference_sums.centroid_sums(points, weights, centroids, codes)


def _slabs(
    key_pages: Sequence[torch.Tensor], value_pages: Sequence[torch.Tensor], angles: Angles | PageAngles | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, Angles | PageAngles | None]]:
    start = 0
    for keys, values in zip(key_pages, value_pages, strict=True):
        stop = start + keys.shape[1]
        yield start, keys, values, page_range(angles, start, stop)
        start = stop
