"""Exact tokens beside codes: the reference against plain softmax, and C++ against the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from native_machines import MACHINES, library_of

from pqkv_kernels.cpu import attention as native_exact
from pqkv_kernels.cpu.attention import exact_obstacle
from pqkv_kernels.cpu.build import find_compiler
from pqkv_kernels.dispatch import attend_exact
from pqkv_kernels.format.tokens import ExactTokens, Part
from pqkv_kernels.reference.attention import add_exact

needs_compiler = pytest.mark.skipif(find_compiler() is None or DEVICE.type != "cpu", reason="needs a CPU and a C++ compiler")
HEADS, GROUP, SCALING = 2, 3, 0.3


def drawn(seed: int, num_sinks: int, num_recent: int, num_queries: int, dim: int) -> tuple[Part, torch.Tensor, ExactTokens]:
    """Three rows of unlike padding; the second has no codes, the third none but those of its sinks."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    first = 128
    starts = torch.tensor([5, first + num_recent - num_queries, 127 - num_sinks], device=DEVICE)
    stops = torch.tensor([first + min(num_recent - num_queries, 7), int(starts[1]), 128], device=DEVICE)
    lse = noise(3, HEADS * GROUP, num_queries)
    lse[1] = -torch.inf
    coded = noise(3, HEADS * GROUP, num_queries, dim)
    coded[1] = 0
    room = noise(2, 3, HEADS, num_recent + 9, dim)  # a window is the first part of a buffer
    tokens = ExactTokens(
        (noise(3, HEADS, num_sinks, dim), noise(3, HEADS, num_sinks, dim)),
        (room[0, :, :, :num_recent], room[1, :, :, :num_recent]),
        *(starts, stops, first),
    )
    return (coded, lse), noise(3, HEADS * GROUP, num_queries, dim), tokens


def dull(coded: Part, query: torch.Tensor, exact: ExactTokens, softcap: float | None) -> Part:
    """One query of one head at a time, in fp64; the codes are one token whose logit is their log-sum-exp."""
    out, lse = coded[0].double().clone(), coded[1].double().clone()
    num_queries, end = query.shape[2], exact.first_slot + exact.recent[0].shape[2]
    for row, head, n in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        start, stop, own = int(exact.starts[row]), int(exact.stops[row]), end - num_queries + n
        kept = [(exact.sinks, slot - start) for slot in range(start, min(stop, start + exact.sinks[0].shape[2]))]
        kept += [(exact.recent, slot - exact.first_slot) for slot in range(max(stop, exact.first_slot), own + 1)]
        keys, values = (torch.stack([sides[i][row, head // GROUP, t] for sides, t in kept]).double() for i in (0, 1))
        logits = keys @ query[row, head, n].double() * SCALING
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = torch.cat((lse[row, head, n][None], logits))
        out[row, head, n] = logits.softmax(0) @ torch.cat((out[row, head, n][None], values))
        lse[row, head, n] = logits.logsumexp(0)
    return out, lse


CASES = st.tuples(
    st.integers(0, 2**31), st.integers(0, 5), st.sampled_from([6, 64, 70, 193]), st.integers(1, 6), st.sampled_from([8, 64, 80])
)


def of_dtype(exact: ExactTokens, dtype: torch.dtype) -> ExactTokens:
    sinks, recent = ((keys.to(dtype), values.to(dtype)) for keys, values in (exact.sinks, exact.recent))
    return replace(exact, sinks=sinks, recent=recent)


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest):
    library = None if find_compiler() is None else library_of(native_exact.EXACT_SOURCE, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_exact, "found_library", lambda source: library)
        yield request.param


@pytest.mark.usefixtures("machine")
@given(case=CASES, softcap=st.sampled_from([None, 4.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_reference_and_loop_are_plain_softmax(
    case: tuple[int, int, int, int, int], softcap: float | None, dtype: torch.dtype
) -> None:
    coded, query, exact = drawn(*case)
    query, exact = query.to(dtype), of_dtype(exact, dtype)
    expected = dull(coded, query, exact, softcap)
    for backend in ("torch", "native"):
        kept = coded[0].clone(), coded[1].clone()
        found = attend_exact(backend, kept, query, exact, SCALING, softcap)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)
        assert torch.equal(kept[0], coded[0]) and torch.equal(kept[1], coded[1])


def test_a_long_chunk_is_answered_block_by_block() -> None:
    coded, query, exact = drawn(3, 4, 600, 530, 16)
    found, expected = add_exact(coded, query, exact, SCALING), dull(coded, query, exact, None)
    torch.testing.assert_close(found[0].double(), expected[0], atol=2e-5, rtol=2e-5)


@needs_compiler
def test_the_loop_serves_a_few_plain_queries() -> None:
    _, query, exact = drawn(1, 4, 70, 2, 64)
    many = drawn(1, 4, 70, 20, 64)
    for queries, tokens, obstacle in (
        (query, exact, None),
        (query.bfloat16(), of_dtype(exact, torch.bfloat16), None),
        (many[1], many[2], "more than 16 queries"),
        (query.bfloat16(), exact, "not all float32 or all bfloat16"),
        (query.half(), of_dtype(exact, torch.float16), "not all float32 or all bfloat16"),
        (query.clone().requires_grad_(), exact, "a gradient is wanted"),
        (query.mT.contiguous().mT, exact, "do not lie side by side"),
    ):
        found = exact_obstacle(queries, tokens)
        assert found is None if obstacle is None else obstacle in found
