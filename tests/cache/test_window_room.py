import pytest
import torch

from pqkv_cli.cache.storage import with_room


def test_first_tokens_get_exactly_their_room_and_later_ones_steps() -> None:
    empty = torch.empty(1, 2, 0, 4)
    first = with_room(empty, 0, 50, 128)
    assert first.shape == (1, 2, 50, 4)
    first.fill_(3)
    grown = with_room(first, 50, 51, 128)
    assert 51 <= grown.shape[2] <= 67
    assert torch.equal(grown[:, :, :50], first)
    assert with_room(grown, 51, 52, 128) is grown


@pytest.mark.parametrize("needed", [120, 128])
def test_the_capacity_is_not_passed(needed: int) -> None:
    assert with_room(torch.empty(1, 2, 119, 4), 119, needed, 128).shape[2] == 128
