"""Centroids searched by cells of the plane: to the bit what the search among all of them finds."""

import pytest
import torch
from native_machines import MACHINES, library_of
from tests_support import random_codebooks

from pqkv_kernels.cpu import encode as native_nearest
from pqkv_kernels.cpu.encode import NativeEncoder, native_top_k
from pqkv_kernels.format.layout import CodeGroup, CodeLayout

pytestmark = pytest.mark.skipif(native_nearest._nearest_library() is None, reason="no C++ compiler on this machine")

POINTS, FEW = 9000, 3000  # enough for cells, and too few


def plane(kind: str, points: int, centroids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [2, N, 2] and centroids [2, K, 2] that some way of cutting the plane could get wrong."""
    generator = torch.Generator().manual_seed(centroids)
    x, c = torch.randn(2, points, 2, generator=generator), torch.randn(2, centroids, 2, generator=generator)
    if kind == "outliers":
        x, c = x / torch.rand(x.shape, generator=generator), c / torch.rand(c.shape, generator=generator)
    elif kind == "ties":  # on a lattice, every other one twice, points in the middle of two or four
        x, c = (4 * x).round() / 2, (2 * c).round()
    elif kind == "one spot":
        c = c[:, :1].expand(-1, centroids, -1)
    elif kind == "a line":
        c = c * torch.tensor([1.0, 0.0])
    elif kind == "far away":
        x, c = 1e-3 * x + 1000, 1e-3 * c + 1000
    elif kind == "tiny":
        x, c = 1e-18 * x, 1e-18 * c
    elif kind == "huge":
        x, c = 1e19 * x, 1e19 * c
    elif kind == "no numbers":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, 0.0])
        x[:, :500] = odd[torch.randint(5, (2, 500, 2), generator=generator)]
        c[:, ::7, 0] = torch.nan
    elif kind == "nothing but no numbers":
        c[:, ::2, 0], c[:, 1::2, 1] = torch.nan, torch.nan
    elif kind == "an infinite centroid":
        c[:, 5] = torch.inf
    return x, c


KINDS = (
    *("normal", "outliers", "ties", "one spot", "a line", "far away", "tiny", "huge"),
    *("no numbers", "nothing but no numbers", "an infinite centroid"),
)


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest):
    library = library_of(native_nearest.NEAREST_SOURCE, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_nearest, "_nearest_library", lambda: library)
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centroids", [256, 1000])
def test_cells_find_what_the_search_among_all_finds(kind: str, centroids: int, machine: str) -> None:
    x, c = plane(kind, POINTS, centroids)
    expected = torch.cat([native_top_k(part, c, 1) for part in x.split(FEW, dim=1)], dim=2)
    assert torch.equal(native_top_k(x, c, 1), expected)


@pytest.mark.parametrize("centroids", [65_536, 65_537])
def test_the_most_centroids_and_one_more_are_found_too(centroids: int, machine: str) -> None:
    x, c = plane("normal", POINTS, centroids)
    expected = torch.cat([native_top_k(part, c, 1) for part in x[:1].split(FEW, dim=1)], dim=2)
    assert torch.equal(native_top_k(x[:1], c[:1], 1), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_prototypes_are_the_same_by_cells(threads: int, generator: torch.Generator) -> None:
    layout = CodeLayout(((CodeGroup(1, 3, 12),), (CodeGroup(2, 8, 2), CodeGroup(2, 9, 2), CodeGroup(1, 6, 4))))
    codebooks = random_codebooks(layout, 2, generator)
    x = torch.randn(2, 2, 1400, 12, generator=generator)
    expected = [NativeEncoder().quantize(part, layout, codebooks) for part in x.split(400, dim=2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = NativeEncoder().quantize(x, layout, codebooks)
    finally:
        torch.set_num_threads(before)
    for codes, parts in zip(found, zip(*expected, strict=True), strict=True):
        assert torch.equal(codes, torch.cat(parts, dim=3))
