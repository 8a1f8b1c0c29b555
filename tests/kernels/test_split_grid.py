from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, inputs
from test_code_attention import SCALING, close, reference

from pqkv_kernels.gpu import attention as triton_attention
from pqkv_kernels.gpu.config import EXACT, DecodeConfig, SplitGrid, split_grid
from pqkv_kernels.reference.attention import code_queries, leave_code_space


def served(grid: SplitGrid, num_heads: int, program: int) -> tuple[int, int] | None:
    """The head and the split of a program, as `split_kernel` finds them; None where it has no work."""
    row, place = divmod(program, grid.width)
    heads_across = grid.width // grid.columns
    layer, row = divmod(row, grid.rows)
    head, column = divmod(place, grid.columns)
    split = row * grid.columns + column
    head += layer * heads_across
    found = place < heads_across * grid.columns and head < num_heads and split < grid.num_splits
    return (head, split) if found else None


@given(
    pages=st.integers(1, 5000),
    heads=st.integers(1, 300),
    processors=st.integers(1, 150),
    programs=st.integers(1, 24),
    least=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_every_split_of_every_head_is_served_once(pages: int, heads: int, processors: int, programs: int, least: int) -> None:
    config = DecodeConfig(programs_per_processor=programs, min_split_pages=least)
    grid = split_grid(config, pages, heads, processors)
    assert grid.split_pages >= least and (grid.num_splits - 1) * grid.split_pages < pages <= grid.num_splits * grid.split_pages
    found = Counter(served(grid, heads, program) for program in range(grid.num_programs))
    del found[None]
    assert found == Counter((head, split) for head in range(heads) for split in range(grid.num_splits))


@pytest.mark.parametrize(("heads", "pages", "expected"), [(8, 2048, (16, 12, 11)), (32, 512, (4, 12, 11)), (8, 1, (16, 1, 2))])
def test_a_processor_serves_one_head_at_a_time(heads: int, pages: int, expected: tuple[int, int, int]) -> None:
    grid = split_grid(DecodeConfig(), pages, heads, 132)
    assert (grid.columns, grid.rows, grid.split_pages) == expected
    for processor in range(132):
        work = [served(grid, heads, program) for program in range(processor, grid.num_programs, 132)]
        assert len({found[0] for found in work if found}) <= 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("processors", [1, 3, 5, 16])
def test_however_many_processors_there_are_the_answer_is_the_reference_s(processors: int, monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "_num_processors", lambda device: processors)
    case = Case("4", 64, 257, 2, "pages", True, None, "exact", 1, torch.float32)
    given = inputs(case, heads=3)
    query = code_queries(given.query, given.keys)
    out, lse = triton_attention.triton_attention(query, given.tokens, SCALING, None, EXACT)
    close((leave_code_space(out, given.values), lse.flatten(1, 2)), reference(given, None), 2e-4)
