"""Every implementation of attention over codes against the dull reference, over awkward shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, Case, Inputs, inputs, pairwise_cases
from native_machines import library_of

from pqkv_kernels.cpu import attention as native_attention
from pqkv_kernels.cpu.build import SOURCE, find_compiler
from pqkv_kernels.dispatch import attend_codes
from pqkv_kernels.format.rotary import token_angles
from pqkv_kernels.gpu.config import EXACT, DecodeConfig
from pqkv_kernels.reference.attention import code_attention, code_queries, leave_code_space
from pqkv_kernels.reference.encode import decode

CASES = pairwise_cases()
needs_compiler = pytest.mark.skipif(find_compiler() is None or DEVICE.type != "cpu", reason="needs a CPU and a C++ compiler")
SCALING = 0.11
NBITS = ("2", "4", "7", "10", "8+6+4", "4,4", "w8,4")


def reference(given: Inputs, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    whole = replace(given.tokens, **dict(zip(("key_pages", "value_pages"), ([pages] for pages in given.pages), strict=True)))
    out, lse = code_attention(code_queries(given.query, given.keys), whole, SCALING, softcap)
    return leave_code_space(out, given.values), lse.flatten(1, 2)


def close(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_cases_cover_every_pair() -> None:
    assert 55 <= len(CASES) <= 100 and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_equals_the_reference(case: Case) -> None:
    given = inputs(case, heads=2)
    found = attend_codes("torch", given.query, given.tokens, SCALING, case.softcap)
    close(found, reference(given, case.softcap), 2e-4)


BUILDS = [("DEFAULT", ""), ("AVX2", ""), ("AVX512", "false"), ("AVX512", "true"), ("AVX512_VBMI", "")]


@pytest.fixture(scope="module", params=BUILDS, ids="-".join)
def machine(request: pytest.FixtureRequest):
    """A processor, and whether it reads tables by loads (or gathers)."""
    name, by_loads = request.param
    library = library_of(SOURCE, name, *([f"-DPQKV_LOADS={by_loads}"] if by_loads else []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_attention, "native_library", lambda: library)
        yield name


@needs_compiler
@pytest.mark.usefixtures("poisoned", "machine")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_native_equals_the_reference(case: Case, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_attention.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native_attention, "_THREAD_PAGES", 1)
    monkeypatch.setattr(native_attention, "_CHUNK_PAGES", 65 if threads == 1 else 2)  # parts that are merged, too
    given = inputs(case, heads=2)
    found = attend_codes("native", given.query, given.tokens, SCALING, case.softcap)
    close(found, reference(given, case.softcap), 2e-4)


@needs_compiler
def test_native_serves_decode_steps_and_leaves_the_rest_to_torch() -> None:
    for num_queries, turn, obstacle in (
        (1, "pages", None),
        (4, "post", None),
        (30, "pages", "matrix products serve more than 16 queries per head better"),
        (1, "tokens", "every token has angles of its own"),
    ):
        given = inputs(Case("8", 64, 100, 4, turn, True, None, "exact", num_queries, torch.float32), heads=2)
        assert native_attention.attention_obstacle(code_queries(given.query, given.keys), given.tokens) == obstacle


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_equals_the_reference(case: Case) -> None:
    from pqkv_kernels.gpu.attention import triton_attention

    given = inputs(case, heads=2)
    fast = DecodeConfig(tables="float16", min_split_pages=2)
    config = fast if case.config == "fast" else EXACT
    out, lse = triton_attention(code_queries(given.query, given.keys), given.tokens, SCALING, case.softcap, config)
    close(
        (leave_code_space(out, given.values), lse.flatten(1, 2)),
        reference(given, case.softcap),
        5e-2 if config is fast else 2e-4,  # float16 keeps eleven bits of products, some of which are in the tens here
    )


@given(
    seed=st.integers(0, 2**31),
    span=st.sets(st.integers(0, 64), min_size=2, max_size=2),
    nbits=st.sampled_from(["2", "4", "7", "10", "8+6+4", "4,4", "w8,4"]),
)
@settings(max_examples=25, deadline=None)
def test_one_token_s_log_sum_exp_is_its_score(seed: int, span: set[int], nbits: str) -> None:
    """The score read from tables and codes is the product of the query with the decoded key."""
    case = Case(nbits, 64, 64, 2, "pages", False, None, "exact", 1, torch.float32)
    given = inputs(case, heads=2)
    query = torch.randn(given.query.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    key_pages, value_pages = given.pages
    keys, values = decode(key_pages, given.keys, token_angles(given.angles)), decode(value_pages, given.values)
    slot, stop = min(span), max(span)
    spans = torch.tensor([[slot, stop]], device=DEVICE)
    out, lse = attend_codes("torch", query, replace(given.tokens, spans=spans), SCALING)
    scores = (query.unflatten(1, (2, 2)) @ keys[:, :, None].mT)[..., slot:stop] * SCALING
    torch.testing.assert_close(lse, scores.logsumexp(-1).flatten(1, 2), atol=2e-4, rtol=2e-4)
    expected = (scores.softmax(-1) @ values[:, :, None, slot:stop]).flatten(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("num_queries", [1, 30])
def test_a_gradient_of_the_queries_is_that_of_the_reference(num_queries: int, backend: str) -> None:
    case = Case("8", 64, 300, 2, "pages", True, None, "exact", num_queries, torch.float32)
    gradients = []
    for function in (backend, "reference"):
        given = inputs(case, heads=2)
        query = given.query.requires_grad_()
        found = attend_codes(backend, query, given.tokens, SCALING) if function == backend else reference(given, None)
        found[0].square().sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_pages_need_not_lie_together_and_queries_may_be_views() -> None:
    case = Case("8", 64, 257, 2, "pages", True, None, "exact", 2, torch.float32)
    given = inputs(case, heads=2)
    expected = reference(given, None)
    spread = [[pages.repeat_interleave(2, 1)[:, ::2]] for pages in given.pages]
    tokens = replace(given.tokens, key_pages=spread[0], value_pages=spread[1])
    query = given.query.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in ("torch", "triton", *(["native"] if find_compiler() and DEVICE.type == "cpu" else [])):
        found = attend_codes(backend, query, tokens, SCALING)
        close(found, expected, 2e-2 if backend == "triton" and DEVICE.type == "cuda" else 2e-4)
