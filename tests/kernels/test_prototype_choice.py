"""Which prototype is stored: of the few nearest, the one whose parts leave least over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import random_codebooks

from pqkv_kernels.cpu import encode as native_parts
from pqkv_kernels.cpu.encode import NativeEncoder, can_choose
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import TRIED_PROTOTYPES, CodeGroup, CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import REFERENCE, Encoder, dequantize, encode, quantize
from pqkv_kernels.reference.nearest import nearest_few

needs_compiler = pytest.mark.skipif(native_parts._parts_library() is None, reason="no C++ compiler on this machine")


def layout_of(first: int, *groups: tuple[int, int, int]) -> CodeLayout:
    stage = tuple(CodeGroup(*group) for group in groups)
    return CodeLayout(((CodeGroup(1, first, sum(group.num_channels for group in stage)),), stage))


NATIVE = NativeEncoder()
ENCODERS = [pytest.param(REFERENCE, id="reference"), pytest.param(NATIVE, id="native", marks=needs_compiler)]
LAYOUTS = (
    layout_of(6, (4, 5, 4)),
    layout_of(3, (2, 6, 1), (3, 4, 2), (1, 7, 8)),
    layout_of(5, (2, 8, 16)),
    layout_of(1, (5, 3, 2)),
)


def dull_choice(x: torch.Tensor, layout: CodeLayout, codebooks) -> torch.Tensor:
    """The least squared error [B, Hkv, T] that the nearest prototypes and greedy parts reach, vector by vector in fp64."""
    least = torch.empty(x.shape[:-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        vector, table = x[b, h, t].double(), codebooks[0][0][h, 0].double()
        totals = []
        for p in (table - vector).square().sum(-1).argsort()[:TRIED_PROTOTYPES]:
            rest, total, offset = vector - table[p], 0.0, 0
            for group, book in zip(layout.stages[1], codebooks[1], strict=True):
                for m in range(group.num_subspaces):
                    part = rest[offset : offset + group.subspace_dim]
                    total += (book[h, m].double() - part).square().sum(-1).min()
                    offset += group.subspace_dim
            totals.append(total)
        least[b, h, t] = min(totals)
    return least


def error(x: torch.Tensor, codes: list[torch.Tensor], layout: CodeLayout, codebooks) -> torch.Tensor:
    return (x - dequantize(codes, layout, codebooks)).double().square().sum(-1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.page_bytes}")
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_is_what_a_dull_search_finds(layout: CodeLayout, tokens: int, encoder: Encoder, generator: torch.Generator) -> None:
    codebooks = random_codebooks(layout, 2, generator)
    x = 1.5 * torch.randn(2, 2, tokens, layout.head_dim, generator=generator)
    codes = encoder.quantize(x, layout, codebooks)
    assert [tuple(c.shape) for c in codes] == [(2, 2, g.num_subspaces, tokens) for stage in layout.stages for g in stage]
    torch.testing.assert_close(error(x, codes, layout, codebooks), dull_choice(x, layout, codebooks), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.page_bytes}")
@pytest.mark.parametrize("tokens", [1, 64, 131])
def test_the_loop_and_torch_agree(layout: CodeLayout, tokens: int, generator: torch.Generator) -> None:
    codebooks = random_codebooks(layout, 3, generator)
    x = torch.randn(2, 3, tokens, layout.head_dim, generator=generator)
    assert can_choose(x, layout.stages[1])
    fast = NATIVE.quantize(x.transpose(0, 1).contiguous().transpose(0, 1), layout, codebooks)
    slow = quantize(x, layout, codebooks)
    errors = [error(x, codes, layout, codebooks) for codes in (fast, slow)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-5)  # ties may fall either way
    assert sum(int((a != b).sum()) for a, b in zip(fast, slow, strict=True)) <= 0.01 * sum(c.numel() for c in fast)


@needs_compiler
def test_threads_change_nothing(generator: torch.Generator) -> None:
    layout = LAYOUTS[1]
    codebooks, x = random_codebooks(layout, 2, generator), torch.randn(1, 2, 300, layout.head_dim, generator=generator)
    expected, before = NATIVE.quantize(x, layout, codebooks), torch.get_num_threads()
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(NATIVE.quantize(x, layout, codebooks), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@given(nbits=st.integers(1, 7), dim=st.sampled_from([1, 2, 4]), scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_it_never_leaves_more_than_the_nearest_prototype(nbits: int, dim: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(nbits, (8 // dim, 4, dim))
    codebooks, x = random_codebooks(layout, 1, generator), scale * torch.randn(1, 1, 40, 8, generator=generator)
    greedy = quantize(x, CodeLayout(layout.stages[:1]), codebooks[:1])
    rest = x - dequantize(greedy, CodeLayout(layout.stages[:1]), codebooks[:1])
    parts = quantize(rest, CodeLayout(layout.stages[1:]), codebooks[1:])
    nearest = error(x, [*greedy, *parts], layout, codebooks)
    assert bool((error(x, quantize(x, layout, codebooks), layout, codebooks) <= nearest * (1 + 1e-4) + 1e-6 * scale).all())


def test_more_stages_and_parts_alone_stay_greedy() -> None:
    whole, part = (CodeGroup(1, 4, 8),), (CodeGroup(4, 4, 2),)
    found = {
        stages: CodeLayout(stages).has_prototypes for stages in ((whole, part), (part, part), (whole, part, part), (whole,))
    }
    assert list(found.values()) == [True, False, False, False]


def test_the_few_nearest_come_in_order(generator: torch.Generator) -> None:
    x, c = torch.randn(3, 70, 24, generator=generator), torch.randn(3, 50, 24, generator=generator)
    expected = torch.cdist(x.double(), c.double()).argsort(2)[..., :4].transpose(1, 2)
    assert torch.equal(nearest_few(x, c, 4), expected)
    for count in (0, 51):
        with pytest.raises(KernelError, match=f"{count} of 50 centroids"):
            nearest_few(x, c, count)


def test_no_vectors_and_one_prototype_twice(generator: torch.Generator) -> None:
    layout = LAYOUTS[3]
    tables = CodecTables(layout, random_codebooks(layout, 2, generator))
    assert encode(torch.zeros(2, 2, 0, 10), tables).shape == (2, 0, 2, layout.page_bytes)
    twice = tables.codebooks[0][0][:, :, :1].expand(-1, -1, 2, -1)
    x = torch.randn(1, 2, 64, 10, generator=generator)
    codes = quantize(x, layout, ((twice,), tables.codebooks[1]))
    once = x - twice[None, :, :, 0].float()
    torch.testing.assert_close(
        error(x, codes, layout, ((twice,), tables.codebooks[1])),
        error(once, codes[1:], CodeLayout(layout.stages[1:]), tables.codebooks[1:]),
    )
