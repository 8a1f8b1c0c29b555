"""Levels on a line: as good as an exhaustive search where one is possible, and as k-means elsewhere."""

from itertools import combinations

import pytest
import torch

from pqkv_cli.baselines.levels import fitted_levels, nearest_level
from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.kmeans import kmeans


def error(x: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    return float((weights * (x - levels[nearest_level(x, levels).long()]).square()).sum())


def exhaustive(x: torch.Tensor, weights: torch.Tensor, num_levels: int) -> float:
    """Least error over all ways to cut the sorted entries into ranges."""
    x, order = x.sort()
    weights = weights[order]
    least = float("inf")
    for cuts in combinations(range(1, len(x)), num_levels - 1):
        bounds = (0, *cuts, len(x))
        cells = [(x[a:b], weights[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        total = sum(float((w * (c - (w * c).sum() / w.sum()).square()).sum()) for c, w in cells)
        least = min(least, total)
    return least


@pytest.mark.parametrize("seed", range(4))
def test_few_entries_are_cut_as_well_as_can_be(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(40, generator=g), torch.rand(40, generator=g) + 0.1
    assert error(x, weights, fitted_levels(x, weights, 3)) <= 1.0001 * exhaustive(x, weights, 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tails", ["normal", "heavy", "two heaps"])
def test_levels_are_no_worse_than_those_of_k_means(bits: int, tails: str) -> None:
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(20000, generator=g)
    if tails == "heavy":
        x = x / torch.randn(4, 20000, generator=g).square().mean(0).sqrt()
    if tails == "two heaps":
        x = x / 5 + torch.where(torch.rand(20000, generator=g) < 0.1, 6.0, 0.0)
    weights = torch.rand(20000, generator=g)
    old = kmeans(x[None, :, None], 1 << bits, weights=weights[None], iterations=50, generator=g).centroids[0, :, 0]
    assert error(x, weights, fitted_levels(x, weights, 1 << bits)) <= 1.002 * error(x, weights, old.sort().values)


def test_rows_are_fitted_each_on_its_own_and_nothing_is_random() -> None:
    g = torch.Generator().manual_seed(9)
    x, weights = torch.randn(2, 3, 500, generator=g), torch.rand(2, 3, 500, generator=g)
    levels = fitted_levels(x, weights, 8)
    assert levels.shape == (2, 3, 8)
    assert bool((levels.diff(dim=-1) > 0).all())
    for i in range(2):
        for j in range(3):
            # Rows that settle early are moved on with the others, by less than anyone sees.
            assert torch.allclose(fitted_levels(x[i, j], weights[i, j], 8), levels[i, j], atol=1e-4)
    assert torch.equal(fitted_levels(x, weights, 8), levels)


def test_degenerate_entries_have_levels_too() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    assert error(x, torch.ones(6), fitted_levels(x, torch.ones(6), 4)) == 0
    # No weight at all counts as equal weights.
    assert torch.equal(fitted_levels(x, torch.zeros(6), 2), torch.tensor([1.0, 2.0]))
    constant = torch.full((10,), 3.0)
    assert torch.equal(fitted_levels(constant, torch.ones(10), 2), torch.tensor([3.0, 3.0]))


def test_what_levels_cannot_be_fitted_to() -> None:
    with pytest.raises(DataError, match="found 3 entries for 4 levels; expected at least one entry per level; calibrate on"):
        fitted_levels(torch.arange(3.0), torch.ones(3), 4)
    with pytest.raises(DataError, match="found NaN, infinite or negatively weighted entries; expected finite ones"):
        fitted_levels(torch.tensor([0.0, float("nan")]), torch.ones(2), 2)
    with pytest.raises(DataError, match="found NaN, infinite or negatively weighted entries"):
        fitted_levels(torch.arange(4.0), -torch.ones(4), 2)
