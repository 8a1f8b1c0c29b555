"""Which samples are fitted, and which only judge."""

import pytest
import torch

from pqkv_cli.calibration.observer import draw_sample
from pqkv_cli.fitting.fit import LEAST_SPLIT, num_fitted, split_samples


def positions(windows: int, tokens: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and windows of a sample, as calibration draws it."""
    sample = draw_sample(windows, tokens, kept, seed=0)
    return (sample % tokens).int(), sample // tokens


@pytest.mark.parametrize(("windows", "judging"), [(2, 1), (15, 1), (16, 1), (31, 1), (32, 2), (100, 6)])
def test_whole_windows_judge(windows: int, judging: int) -> None:
    at, window = positions(windows, 4000, 6000)
    fitted, judged = split_samples(at)
    assert torch.equal(torch.cat((fitted, judged)).sort().values, torch.arange(6000))
    assert not set(window[fitted].tolist()) & set(window[judged].tolist())
    assert len(window[judged].unique()) == judging


@pytest.mark.parametrize(("windows", "kept"), [(8, LEAST_SPLIT - 1), (1, LEAST_SPLIT)])
def test_few_samples_do_both(windows: int, kept: int) -> None:
    fitted, judged = split_samples(positions(windows, 5000, kept)[0])
    assert torch.equal(fitted, torch.arange(kept)) and torch.equal(judged, fitted)


@pytest.mark.parametrize("most", [100, 5000, 10_000])
def test_one_in_so_many_is_counted(most: int) -> None:
    at, _ = positions(20, 500, 8000)
    fitted = split_samples(at)[0]
    stride = -(-len(fitted) // most)
    assert num_fitted(at, most) == len(fitted[::stride]) <= most
