"""Which backend runs, and why. The only place that chooses among backends.

A backend that is asked for by name runs or raises: nothing falls back silently. ``auto`` takes the first that can run and says
which and why. A new one is a class with the methods of `Backend` in a folder of its own, and its name here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from pqkv_kernels.cpu.backend import NativeBackend, TorchBackend
from pqkv_kernels.cpu.build import found_library
from pqkv_kernels.cpu.centroid_sums import SOURCE as CENTROIDS_SOURCE
from pqkv_kernels.cpu.centroid_sums import native_centroid_sums
from pqkv_kernels.cpu.encode import NEAREST_SOURCE
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.checks import check_attention, check_encode
from pqkv_kernels.format.layout import CodeLayout
from pqkv_kernels.format.pairs import planes_of
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens, Part
from pqkv_kernels.gpu.backend import TritonBackend
from pqkv_kernels.reference import centroid_sums as reference_sums
from pqkv_kernels.reference.attention import code_queries, leave_code_space
from pqkv_kernels.reference.encode import REFERENCE, Codebooks, Encoder
from pqkv_kernels.reference.prediction import plane_prediction


class Backend(Protocol):
    """One implementation of the operations. Arguments are checked before they come here.

    Attributes
    ----------
    merit
        What speaks for it where it can run, in words.
    """

    merit: str

    def suits(self, device: torch.device) -> bool:
        """Return whether ``auto`` tries it on `device`."""

    def obstacle(self, device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
        """Return why it cannot run on `device` for the key and value tables of `codecs`, in words; None where it can."""

    def prepare(self, tables: CodecTables) -> None:
        """Make what it reads of `tables`, once."""

    def encode(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
        """Do what `pqkv_kernels.reference.encode.Encoder.encode` does."""

    def attend_codes(self, query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None) -> Part:
        """Do what `pqkv_kernels.reference.attention.code_attention` does; there are queries and pages."""

    def attend_exact(self, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
        """Do what `pqkv_kernels.reference.attention.add_exact` does."""


BackendName = Literal["torch", "native", "triton"]
BackendRequest = Literal["auto", BackendName]
# In the order in which ``auto`` tries them.
BACKENDS: Mapping[BackendName, Backend] = {"triton": TritonBackend(), "native": NativeBackend(), "torch": TorchBackend()}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that will run, and the reason in words."""

    name: BackendName
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
    if requested != "auto":
        obstacle = BACKENDS[requested].obstacle(device, codecs)
        if obstacle is not None:
            raise KernelError(f"the {requested} backend was asked for, but {obstacle}; choose torch or auto")
        return Choice(requested, "asked for by name")
    obstacles: list[str] = []
    for name, backend in BACKENDS.items():
        if backend.suits(device):
            obstacle = backend.obstacle(device, codecs)
            if obstacle is None:
                return Choice(name, "; ".join(obstacles) or f"the device is {device.type} and {backend.merit}")
            obstacles.append(obstacle)
    raise KernelError(f"no backend can run on {device.type}: {'; '.join(obstacles)}")


def prepare_tables(backend: BackendName, keys: CodecTables, values: CodecTables) -> None:
    """Make what `backend` reads of a layer's tables, once and on the present stream: a step that finds it waits for nothing."""
    for tables in (keys, values):
        if tables.permutation is not None:
            tables.inverse_permutation()
        BACKENDS[backend].prepare(tables)
    if values.prediction is not None and planes_of(keys) is not None:
        plane_prediction(keys, values)


def attend_codes(
    backend: BackendName, query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None = None
) -> Part:
    """Attend with model-space queries to coded tokens, all of which precede all queries.

    Parameters
    ----------
    backend
        As `choose_backend` names it.
    query
        [B, H, Tq, D], any float dtype.
    tokens, scaling, softcap
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
    check_attention(query, tokens)
    if not query.numel() or not tokens.num_pages:
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    output, lse = BACKENDS[backend].attend_codes(code_queries(query, tokens.keys), tokens, scaling, softcap)
    return leave_code_space(output, tokens.values), lse.flatten(1, 2)


def attend_exact(
    backend: BackendName, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None = None
) -> Part:
    """Add exact tokens to what `attend_codes` returned, as `pqkv_kernels.reference.attention.add_exact` does."""
    return BACKENDS[backend].attend_exact(coded, query, exact, scaling, softcap)


def encode_pages(backend: BackendName, x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode whole pages of vectors, as `pqkv_kernels.reference.encode.Encoder.encode` does.

    Raises
    ------
    KernelError
        If shapes or devices do not fit, or angles are missing.
    """
    check_encode(x, tables, angles)
    return BACKENDS[backend].encode(x, tables, angles)


def fastest_encoder(device: torch.device) -> Encoder:
    """Return the steps of encoding for tensors on `device` that nobody chose a backend for: of fits, studies and checks.

    They are C++ on a CPU with a compiler and the reference's elsewhere; codes differ at most where rounding decides.
    """
    return NativeBackend.encoder if device.type == "cpu" and found_library(NEAREST_SOURCE) is not None else REFERENCE


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
