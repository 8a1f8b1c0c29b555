"""Additive stages over the same parts: the encoder finds the nearest sum, and stores it as codes of each stage."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import random_codebooks

from pqkv_kernels.format.layout import MOST_JOINT_NBITS, CodeGroup, CodeLayout
from pqkv_kernels.reference.encode import dequantize, quantize
from pqkv_kernels.reference.merged_stages import joint_layout


def layout_of(*stages: tuple[tuple[int, int, int], ...]) -> CodeLayout:
    return CodeLayout(tuple(tuple(CodeGroup(*group) for group in stage) for stage in stages))


LAYOUTS = (
    layout_of(((4, 3, 2),), ((4, 3, 2),)),
    layout_of(((4, 4, 2),), ((1, 3, 2), (2, 2, 2), (1, 1, 2))),  # a table of the first stage serves three runs of the second
    layout_of(((3, 2, 2), (2, 4, 1)), ((1, 1, 2), (2, 2, 2), (2, 3, 1)), ((3, 1, 2), (2, 1, 1))),
    layout_of(((1, 5, 6),), ((3, 2, 2),), ((3, 3, 2),)),  # a prototype before two stages that go together
    layout_of(((1, 3, 6),), ((1, 3, 6),), ((2, 4, 3),)),  # prototypes that go together
)


def nearest_sum(part: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
    """The least squared distance of `part` [d] to a sum of one row of each of `tables` [K, d], in fp64."""
    return min((part - sum(rows)).square().sum() for rows in itertools.product(*(t.double() for t in tables)))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_codes_are_those_of_the_nearest_sum(layout: CodeLayout, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    books = random_codebooks(layout, 2, generator)
    x = torch.randn(1, 2, 3, layout.head_dim, generator=generator)
    found = dequantize(quantize(x, layout, books), layout, books)
    for h, t in itertools.product(range(2), range(3)):
        total, channel = 0.0, 0
        rows = [[table[h, m] for table in stage for m in range(table.shape[1])] for stage in books]
        for tables in zip(*rows, strict=True):
            width = tables[0].shape[-1]
            total += nearest_sum(x[0, h, t, channel : channel + width].double(), list(tables))
            channel += width
        assert (x[0, h, t] - found[0, h, t]).double().square().sum() == pytest.approx(float(total), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_stay_within_their_tables_and_in_storage_order(layout: CodeLayout) -> None:
    books = random_codebooks(layout, 2, torch.Generator().manual_seed(5))
    codes = quantize(torch.randn(2, 2, 70, layout.head_dim), layout, books)
    spans = list(layout.spans())
    assert len(codes) == len(spans)
    for found, (_, _, group, _, _) in zip(codes, spans, strict=True):
        assert found.shape == (2, 2, group.num_subspaces, 70)
        assert int(found.min()) >= 0 and int(found.max()) < group.num_centroids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_say_where_a_page_holds_every_code(layout: CodeLayout) -> None:
    joint = joint_layout(layout)
    stored = {}
    for stage, index, group, byte_offset, _ in layout.spans():
        for m in range(group.num_subspaces):
            stored[stage, index, m] = byte_offset + m * group.page_bytes // group.num_subspaces
    found = {}
    for groups, shares in zip(joint.layout.stages, joint.shares, strict=True):
        for group, shared in zip(groups, shares, strict=True):
            assert group.nbits == sum(share.nbits for share in shared)
            for share, m in itertools.product(shared, range(group.num_subspaces)):
                found[share.stage, share.group, share.first + m] = share.byte_offset + m * 8 * share.nbits
    assert found == stored


def test_what_goes_together() -> None:
    part, other = ((4, 4, 2),), ((2, 4, 4),)
    assert len(joint_layout(layout_of(part, part)).layout.stages) == 1
    assert len(joint_layout(layout_of(part, other)).layout.stages) == 2  # other parts
    assert MOST_JOINT_NBITS == 10
    assert len(joint_layout(layout_of(part, part, ((4, 2, 2),))).layout.stages) == 1
    assert len(joint_layout(layout_of(part, part, ((4, 3, 2),))).layout.stages) == 2  # 11 bits
    assert joint_layout(layout_of(((1, 8, 8),), part, part)).layout.has_prototypes
    alone = layout_of(((2, 3, 2), (1, 5, 4)))
    assert joint_layout(alone).layout == alone


def test_a_layout_without_joint_stages_keeps_its_codebooks() -> None:
    layout = layout_of(((1, 6, 8),), ((4, 4, 2),))
    books = random_codebooks(layout, 1, torch.Generator().manual_seed(0))
    assert joint_layout(layout).codebooks(books) is books
