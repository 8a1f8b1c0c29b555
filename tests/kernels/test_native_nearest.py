"""The C++ search for nearest centroids: the same answers as matrix products, on any number of threads."""

import pytest
import torch

from pqkv_kernels.cpu import build as native_build
from pqkv_kernels.cpu import build as native_threads
from pqkv_kernels.cpu import encode as native
from pqkv_kernels.cpu.encode import MOST_TOP_K, SHORT_DIMS, NativeEncoder, can_search, native_top_k
from pqkv_kernels.errors import KernelError
from pqkv_kernels.reference.nearest import nearest_centroids

needs_compiler = pytest.mark.skipif(native._nearest_library() is None, reason="no C++ compiler on this machine")
NATIVE = NativeEncoder()


def points_and_centroids(subspaces: int, points: int, centroids: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(points * dim + centroids)
    return torch.randn(subspaces, points, dim, generator=generator), torch.randn(subspaces, centroids, dim, generator=generator)


@needs_compiler
@pytest.mark.parametrize("dim", (*SHORT_DIMS, 3, 16, 65))
@pytest.mark.parametrize("points", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("centroids", [1, 7, 256])
def test_it_finds_what_matrix_products_find(dim: int, points: int, centroids: int, poisoned: None) -> None:
    x, c = points_and_centroids(5, points, centroids, dim)
    assert can_search(x)
    found, expected = NATIVE.nearest(x, c), nearest_centroids(x, c)
    distances = torch.cdist(x.double(), c.double()).square()
    lost = distances.gather(2, found[..., None]) - distances.gather(2, expected[..., None])
    assert float(lost.abs().max()) < 1e-5  # two centroids may be equally near but for rounding
    assert int((found != expected).sum()) <= 2


@needs_compiler
@pytest.mark.parametrize("count", range(1, MOST_TOP_K + 1))
@pytest.mark.parametrize(("dim", "centroids"), [(2, 4), (16, 21), (80, 130)])
def test_it_finds_the_nearest_few_in_order(count: int, dim: int, centroids: int, poisoned: None) -> None:
    x, c = points_and_centroids(3, 70, centroids, dim)
    found = NATIVE.few(x, c, count)
    assert found.shape == (3, count, 70)
    distances = torch.cdist(x.double(), c.double()).square()
    expected = distances.sort(dim=2).values[..., :count]
    assert torch.allclose(distances.gather(2, found.transpose(1, 2)), expected, atol=1e-5)
    assert torch.equal(found[:, 0], NATIVE.nearest(x, c)) or dim == 2  # another loop, which rounds in another order


@needs_compiler
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("own", [False, True])
def test_threads_and_memory_layout_change_nothing(count: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own:  # as where torch has no OpenMP
        monkeypatch.setattr(native_threads, "_shared_threads", lambda: None)
    x, c = points_and_centroids(7, 130, 16, 2)
    expected = native_top_k(x, c, count)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(native_top_k(x, c, count), expected)
    finally:
        torch.set_num_threads(before)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(native_top_k(turned, c.double(), count), expected)


@needs_compiler
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch computes without OpenMP here")
def test_loops_run_on_the_threads_of_torch() -> None:
    assert native_threads._shared_threads() is not None


@needs_compiler
def test_ties_go_to_the_smaller_index() -> None:
    _, c = points_and_centroids(2, 1, 9, 4)
    twice = torch.cat((c, c), dim=1)
    assert torch.equal(native_top_k(twice, twice, 1)[:, 0], torch.arange(9).repeat(2).expand(2, 18))
    assert torch.equal(native_top_k(twice, twice, 2)[:, 1], torch.arange(9, 18).repeat(2).expand(2, 18))


def test_other_devices_and_machines_without_a_compiler_use_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = points_and_centroids(2, 40, 8, 2)
    assert not can_search(x, MOST_TOP_K + 1)
    assert not can_search(torch.zeros(1, 1, 2, device="meta"))
    expected = NATIVE.nearest(x, c)

    def missing(source: object) -> None:
        raise KernelError("no C++ compiler was found")

    native_build.found_library.cache_clear()
    monkeypatch.setattr(native_build, "native_library", missing)
    try:
        assert not can_search(x)
        assert torch.equal(NATIVE.nearest(x, c), expected)
    finally:
        native_build.found_library.cache_clear()
