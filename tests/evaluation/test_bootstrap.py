import numpy as np
import pytest

from pqkv_cli.evaluation.scores import Floats, interval95


def ratio(a: Floats, b: Floats) -> float:
    return float(b.mean() / a.mean()) if a.mean() else float("nan")


def sample(size: int, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    baseline = rng.normal(5, 1, size)
    return baseline, baseline * rng.normal(0.9, 0.05, size)


def test_the_interval_is_that_of_its_seed() -> None:
    data = sample(40)
    assert interval95(ratio, *data, seed=1) == interval95(ratio, *data, seed=1)
    assert interval95(ratio, *data, seed=1) != interval95(ratio, *data, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_estimate_and_shrinks(seed: int) -> None:
    widths = []
    for size in (20, 320):
        data = sample(size, seed)
        found = interval95(ratio, *data, seed=0)
        assert found is not None
        assert found[0] <= ratio(*data) <= found[1]
        widths.append(found[1] - found[0])
    assert 2 < widths[0] / widths[1] < 8  # sixteen times the examples, a quarter of the width


def test_examples_stay_paired() -> None:
    baseline = np.linspace(1, 100, 30)
    found = interval95(ratio, baseline, 0.5 * baseline, seed=0)
    assert found == pytest.approx([0.5, 0.5])


def test_no_interval_where_none_is_defined() -> None:
    one = np.array([0.5])
    assert interval95(ratio, one, one, seed=0) is None
    assert interval95(ratio, np.zeros(0), np.zeros(0), seed=0) is None
    assert interval95(ratio, np.zeros(9), np.ones(9), seed=0) is None
