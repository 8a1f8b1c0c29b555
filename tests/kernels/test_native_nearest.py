"""The C++ search for nearest centroids: the same answers as matrix products, on any number of threads."""

import pytest
import torch

from pqkv_kernels import native_build
from pqkv_kernels import native_nearest as native
from pqkv_kernels.errors import KernelError
from pqkv_kernels.native_nearest import DIMS, can_search
from pqkv_kernels.nearest import CPU_BLOCK_SCORES, nearest_centroids

needs_compiler = pytest.mark.skipif(native._library() is None, reason="no C++ compiler on this machine")


def points_and_centroids(subspaces: int, points: int, centroids: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(points * dim + centroids)
    return torch.randn(subspaces, points, dim, generator=generator), torch.randn(subspaces, centroids, dim, generator=generator)


@needs_compiler
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("points", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("centroids", [1, 7, 256])
def test_it_finds_what_matrix_products_find(dim: int, points: int, centroids: int, poisoned: None) -> None:
    x, c = points_and_centroids(5, points, centroids, dim)
    assert can_search(x)
    found, expected = nearest_centroids(x, c), nearest_centroids(x, c, block_scores=CPU_BLOCK_SCORES)
    distances = torch.cdist(x.double(), c.double()).square()
    lost = distances.gather(2, found[..., None]) - distances.gather(2, expected[..., None])
    assert float(lost.abs().max()) < 1e-5  # two centroids may be equally near but for rounding
    assert int((found != expected).sum()) <= 2


@needs_compiler
def test_threads_and_memory_layout_change_nothing() -> None:
    x, c = points_and_centroids(7, 130, 16, 2)
    expected = native.native_nearest(x, c)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(native.native_nearest(x, c), expected)
    finally:
        torch.set_num_threads(before)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(native.native_nearest(turned, c.double()), expected)


@needs_compiler
def test_ties_go_to_the_smaller_index() -> None:
    _, c = points_and_centroids(2, 1, 9, 4)
    twice = torch.cat((c, c), dim=1)
    assert torch.equal(native.native_nearest(twice, twice), torch.arange(9).repeat(2).expand(2, 18))


def test_long_points_and_machines_without_a_compiler_use_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = points_and_centroids(2, 40, 8, 2)
    assert not can_search(torch.zeros(1, 1, 64))
    assert not can_search(torch.zeros(1, 1, 2, device="meta"))
    expected = nearest_centroids(x, c)

    def missing(source: object) -> None:
        raise KernelError("no C++ compiler was found")

    native_build.found_library.cache_clear()
    monkeypatch.setattr(native_build, "native_library", missing)
    try:
        assert not can_search(x)
        assert torch.equal(nearest_centroids(x, c), expected)
    finally:
        native_build.found_library.cache_clear()
