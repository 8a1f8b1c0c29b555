import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqkv_cli.errors import CacheError
from pqkv_cli.hf.steps import row_starts, step_positions

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([torch.int64, torch.bool, torch.float32]))
def test_row_starts_count_the_padding_of_each_row(padding: list[int], dtype: torch.dtype) -> None:
    mask = torch.stack([torch.arange(9) >= count for count in padding]).to(dtype)
    starts = row_starts(mask, len(padding), 9)
    assert starts is not None and starts.dtype == torch.int64
    assert starts.tolist() == padding


def test_without_a_mask_row_starts_stay_what_they_were() -> None:
    assert row_starts(None, 2, 5) is None


@given(st.lists(st.booleans(), min_size=2, max_size=8))
def test_padding_behind_a_real_token_is_refused(real: list[bool]) -> None:
    mask = torch.tensor([[True] * len(real), real])
    first = real.index(True) if any(real) else len(real)
    if all(real[first:]):
        assert row_starts(mask, 2, len(real)) is not None
    else:
        with pytest.raises(CacheError, match="padding_side = 'left'"):
            row_starts(mask, 2, len(real))


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(2, 4), r"\[2, 4\]"),
        (torch.ones(1, 5), r"\[1, 5\]"),
        (torch.ones(2, 1, 5, 5), r"\[2, 1, 5, 5\]"),
        ({"full_attention": torch.ones(2, 5)}, "dict"),
    ],
)
def test_masks_of_another_shape_are_refused(mask: object, found: str) -> None:
    with pytest.raises(CacheError, match=rf"attention_mask is {found}; expected \[2, 5\]"):
        row_starts(mask, 2, 5)


def test_positions_without_position_ids_go_on_behind_the_past() -> None:
    assert step_positions(None, 2, 3, 7, CPU).tolist() == [[7, 8, 9]] * 2


def test_given_positions_are_taken_as_they_are() -> None:
    given_ids = torch.tensor([[5, 9, 6], [0, 0, 1]])
    assert torch.equal(step_positions(given_ids, 2, 3, 7, CPU), given_ids)
    assert step_positions(given_ids[:1], 2, 3, 0, CPU).tolist() == [[5, 9, 6]] * 2


def test_positions_of_several_axes_are_refused() -> None:
    with pytest.raises(CacheError, match=r"shape \[3, 2, 4\]; expected \[batch, tokens\]"):
        step_positions(torch.zeros(3, 2, 4, dtype=torch.int64), 2, 4, 0, CPU)
