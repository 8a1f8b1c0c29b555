"""Tables whose sums code the points: beside free tables, scalar codes, and tables fitted one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.additive import fit_sums
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_kernels.reference.merged_stages import all_sums
from pqkv_kernels.reference.nearest import nearest_centroids


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_over(points: torch.Tensor, tables: list[torch.Tensor], weights: torch.Tensor | None = None) -> torch.Tensor:
    """The weighted mean squared error [S] with which the nearest sums stand for the points."""
    sums = all_sums(tables)
    codes = nearest_centroids(points, sums)
    error = (points - sums.gather(1, codes[..., None].expand(points.shape))).square().sum(-1)
    return error.mean(1) if weights is None else (error * weights).sum(1) / weights.sum(1)


def test_sums_lie_in_the_order_of_codes() -> None:
    first, second = torch.randn(2, 4, 3), torch.randn(2, 8, 3)
    sums = all_sums([first, second])
    assert sums.shape == (2, 32, 3)
    for code in range(32):
        assert torch.equal(sums[:, code], second[:, code >> 2] + first[:, code & 3])


@given(seed=st.integers(0, 2**31), sizes=st.sampled_from([(4, 4), (8, 2), (4, 2, 2), (2, 2)]), dim=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_never_worse_than_one_table_after_the_other(seed: int, sizes: tuple[int, ...], dim: int) -> None:
    points = torch.randn(3, 400, dim, generator=generator(seed))
    found = fit_sums(points, sizes, weights=None, iterations=8, generator=generator(seed))
    assert [tuple(t.shape) for t in found] == [(3, size, dim) for size in sizes]
    rest, begun, random = points, [], generator(seed)
    for size in sizes:
        table = kmeans(rest, size, iterations=8, generator=random).centroids
        rest = rest - table.gather(1, nearest_centroids(rest, table)[..., None].expand(rest.shape))
        begun.append(table)
    assert (left_over(points, found) <= rest.square().sum(-1).mean(1) * 1.001).all()


def test_independent_channels_cost_no_more_than_codes_of_one_channel() -> None:
    points = torch.randn(2, 4000, 2, generator=generator(1)) * torch.tensor([3.0, 1.0])
    scalar = sum(
        kmeans(points[..., c : c + 1], size, iterations=25, generator=generator(2)).distortion for c, size in ((0, 16), (1, 4))
    )
    found = fit_sums(points, (16, 4), weights=None, iterations=25, generator=generator(3))
    free = kmeans(points, 64, iterations=25, generator=generator(4)).distortion
    assert (left_over(points, found) < scalar).all()
    assert (left_over(points, found) > free).all()


def test_points_that_are_sums_are_found_again() -> None:
    grid = torch.cartesian_prod(torch.arange(4.0), 10 * torch.arange(4.0))
    points = grid[torch.randint(0, 16, (1, 500), generator=generator(5))]
    assert float(left_over(points, fit_sums(points, (4, 4), weights=None, iterations=25, generator=generator(6)))) < 1e-9


def test_weights_pull_the_error_down_where_they_are() -> None:
    points, weights = torch.randn(2, 2000, 2, generator=generator(7)), torch.ones(2, 2000)
    weights[:, :200] = 50
    plain, weighted = (fit_sums(points, (8, 8), weights=w, iterations=12, generator=generator(8)) for w in (None, weights))
    assert (left_over(points, weighted, weights) < left_over(points, plain, weights)).all()


def test_same_seed_same_bits_and_equal_points_cost_nothing() -> None:
    points = torch.randn(2, 300, 2, generator=generator(9))
    one, two = (fit_sums(points, (4, 4), weights=None, iterations=5, generator=generator(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    nothing = fit_sums(points, (4, 4), weights=torch.zeros(2, 300), iterations=5, generator=generator(1))
    assert all(bool(torch.isfinite(table).all()) for table in nothing)
    same = torch.full((1, 50, 2), 3.0)
    assert float(left_over(same, fit_sums(same, (4, 4), weights=None, iterations=5, generator=generator(0)))) < 1e-9


def test_bad_points_are_refused() -> None:
    with pytest.raises(DataError, match="found 3 vectors for 4 centroids"):
        fit_sums(torch.zeros(1, 3, 2), (4, 4), weights=None, iterations=2, generator=generator())
    with pytest.raises(DataError, match="NaN, infinite or negatively weighted"):
        fit_sums(torch.full((1, 30, 2), torch.nan), (4, 4), weights=None, iterations=2, generator=generator())
