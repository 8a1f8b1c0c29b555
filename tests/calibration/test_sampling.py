import pytest
import torch

from pqkv_cli.calibration.collect import CollectSettings
from pqkv_cli.calibration.observer import draw_queries, draw_sample, token_priorities
from pqkv_cli.errors import DataError, UsageError


def test_the_sample_holds_the_smallest_priorities() -> None:
    sample = draw_sample(50, 40, 300, seed=7)
    priorities = token_priorities(50, 40, seed=7)
    assert torch.equal(sample, sample.unique())
    assert len(sample) == 300
    rest = torch.ones(2000, dtype=torch.bool)
    rest[sample] = False
    assert priorities[sample].max() < priorities[rest].min()


def test_a_larger_reservoir_contains_a_smaller_one() -> None:
    small, large = draw_sample(50, 40, 100, seed=7), draw_sample(50, 40, 300, seed=7)
    assert bool(torch.isin(small, large).all())


def test_fewer_tokens_than_room_are_all_kept() -> None:
    assert torch.equal(draw_sample(2, 5, 100, seed=0), torch.arange(10))


def test_seeds_matter() -> None:
    assert not torch.equal(draw_sample(50, 40, 100, seed=0), draw_sample(50, 40, 100, seed=1))


@pytest.mark.parametrize("count", [1, 5, 24, 100])
def test_queries_lie_one_per_stretch(count: int) -> None:
    queries = draw_queries(3, 24, count, seed=0)
    count = min(count, 24)
    assert len(queries) == count
    stretch = torch.arange(count + 1) * 24 // count
    assert bool((queries >= stretch[:-1]).all()) and bool((queries < stretch[1:]).all())
    assert torch.equal(queries, draw_queries(3, 24, count, seed=0))


def test_windows_have_their_own_queries() -> None:
    assert not torch.equal(draw_queries(0, 512, 64, seed=0), draw_queries(1, 512, 64, seed=0))


@pytest.mark.parametrize(
    ("num_samples", "share", "held_out"), [(8, 1 / 8, 1), (32, 1 / 8, 4), (2, 1 / 8, 1), (9, 0.5, 4), (4, 0.0, 1)]
)
def test_held_out_windows(num_samples: int, share: float, held_out: int) -> None:
    settings = CollectSettings("", num_samples, 16, held_out_share=share)
    assert (settings.num_held_out, settings.num_windows) == (held_out, num_samples - held_out)


def test_senseless_settings() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        CollectSettings("", 8, 16, batch_size=0)
    with pytest.raises(UsageError, match="held_out_share is 1"):
        CollectSettings("", 8, 16, held_out_share=1.0)
    with pytest.raises(DataError, match="has 1 window"):
        CollectSettings("", 1, 16)
