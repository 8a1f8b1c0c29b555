"""What a step of k-means needs of every point: C++ against torch."""

import pytest
import torch

from pqkv_kernels.cpu.build import found_library
from pqkv_kernels.cpu.centroid_sums import SOURCE, native_centroid_sums
from pqkv_kernels.reference.centroid_sums import centroid_sums


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_loop_means_what_torch_says(dim: int, threads: int) -> None:
    if found_library(SOURCE) is None:
        pytest.skip("no C++ compiler on this machine")
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(dim)
    points = torch.randn(5, 301, dim + 1, generator=generator)[..., :dim]  # not contiguous
    weights = torch.rand(5, 301, generator=generator) * (torch.rand(5, 301, generator=generator) > 0.1)
    centroids = torch.randn(5, 7, dim, generator=generator)
    codes = torch.randint(0, 6, (5, 301), generator=generator)  # the last centroid has no point
    try:
        torch.set_num_threads(threads)
        sums, errors = native_centroid_sums(points, weights, centroids, codes)
    finally:
        torch.set_num_threads(before)
    expected_sums, expected_errors = centroid_sums(points, weights, centroids, codes)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-5, atol=1e-6)
    assert (sums[:, 6] == 0).all() and sums.dtype == torch.float64


@pytest.mark.parametrize("dim", [2, 20])
def test_the_sums_are_those_of_each_point_in_turn(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points, weights = torch.randn(2, 9, dim, generator=generator), torch.rand(2, 9, generator=generator)
    centroids, codes = torch.randn(2, 3, dim, generator=generator), torch.randint(0, 3, (2, 9), generator=generator)
    sums, errors = centroid_sums(points, weights, centroids, codes)
    for s in range(2):
        for k in range(3):
            chosen = [n for n in range(9) if codes[s, n] == k]
            total = sum((weights[s, n] * points[s, n] for n in chosen), torch.zeros(dim))
            torch.testing.assert_close(sums[s, k, :-1].float(), total)
            assert float(sums[s, k, -1]) == pytest.approx(sum(float(weights[s, n]) for n in chosen))
        for n in range(9):
            apart = (points[s, n] - centroids[s, codes[s, n]]).square().sum()
            assert float(errors[s, n]) == pytest.approx(float(weights[s, n] * apart), rel=1e-5)
