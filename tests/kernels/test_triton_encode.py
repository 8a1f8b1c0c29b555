import pytest
import torch
from kernel_cases import DEVICE, Case, inputs
from tests_support import value_tables

from pqkv_kernels.dispatch import encode_pages
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.rotary import token_angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu import encode as triton_encode
from pqkv_kernels.reference.encode import decode, encode, to_code_space

CASES = [
    Case(nbits, dim, num_tokens, 1, turn, unequal, None, "exact", 1, torch.float32)
    for nbits, dim, num_tokens, turn, unequal in (
        ("1", 64, 64, "pages", False),
        ("2", 80, 64, "tokens", True),
        ("3", 16, 128, "post", False),
        ("4", 64, 64, "interleaved", False),
        ("5", 16, 64, "partial", True),
        ("6", 24, 64, "pages", False),
        ("7", 16, 64, "post", True),
        ("8", 16, 64, "pages", False),
        ("10", 8, 64, "tokens", False),
        ("8+6+4", 32, 64, "partial", False),
        ("4,4", 32, 128, "pages", False),
        ("w8,4", 32, 128, "pages", True),
        ("w1,5", 16, 64, "partial", False),
        ("w6,4+3", 80, 64, "post", True),
        ("w4,w4,2", 16, 64, "post", False),
        ("4,4,2", 16, 64, "pages", False),
        ("4,4,3", 16, 64, "pages", False),
        ("4,3+2", 16, 128, "partial", True),
        ("w8,4,2+1", 32, 64, "pages", False),
    )
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_encoding_is_as_near_as_the_reference(case: Case) -> None:
    given = inputs(case)
    batch, dim = len(given.query), case.dim
    shape = (batch, case.num_tokens, 1, dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE).transpose(1, 2)  # as projections come
    angles = token_angles(given.angles)
    pages, expected = encode_pages("triton", x, given.keys, angles), encode(x, given.keys, angles)
    assert pages.shape == expected.shape and pages.dtype == torch.uint8
    distances = [_distance(x, p, given, angles) for p in (pages, expected)]  # ties may fall either way
    torch.testing.assert_close(*distances, atol=1e-4, rtol=1e-4)
    assert (pages != expected).float().mean() < 0.01


def _distance(x, pages, given, angles):
    decoded = to_code_space(decode(pages, given.keys, angles), given.keys, angles)
    return (to_code_space(x, given.keys, angles) - decoded).square().sum(-1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["w6,4+3", "8,8"])
def test_a_prompt_encoded_part_by_part_is_encoded(layout, monkeypatch) -> None:
    """Parts of one page each, and programs of three tiles, where there are four in two pages."""
    given = inputs(Case(layout, 16, 192, 1, "tokens", True, None, "exact", 1, torch.float32))
    x = torch.randn(len(given.query), 192, 1, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE).transpose(1, 2)
    angles = token_angles(given.angles)
    whole = encode_pages("triton", x, given.keys, angles)
    monkeypatch.setattr(triton_encode, "_SCRATCH_NUMBERS", 2 * len(x) * 64 * 16)
    monkeypatch.setattr(triton_encode, "_MOST_TILES", 3)
    assert torch.equal(encode_pages("triton", x, given.keys, angles), whole)


@pytest.mark.parametrize(("size", "tolerance"), [(1e-6, 1e-4), (1e3, 1e-4), (1e8, 1e-3)])
def test_points_far_outside_of_every_table_are_coded(size, tolerance) -> None:
    given = inputs(Case("8", 16, 64, 1, "post", False, None, "exact", 1, torch.float32))
    x = size * torch.randn(len(given.query), 1, 64, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    distances = [_distance(x, encode_pages(kind, x, given.keys), given, None) for kind in ("triton", "torch")]
    torch.testing.assert_close(*distances, atol=1e-4, rtol=tolerance)


def test_tables_that_lie_on_one_side_of_zero_are_searched(generator) -> None:
    tables = value_tables(generator)
    books = tuple(tuple(table + 5 for table in stage) for stage in tables.codebooks)
    tables = CodecTables(tables.layout, books).to(DEVICE)
    x = 5 * torch.randn(2, 2, 64, 16, generator=generator).to(DEVICE)  # on the other side, too
    found = [(decode(encode_pages(kind, x, tables), tables) - x).square().sum(-1) for kind in ("triton", "torch")]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_numbers_that_are_none_have_codes_of_the_table() -> None:
    given = inputs(Case("3", 16, 64, 1, "post", False, None, "exact", 1, torch.float32))
    for value in (float("nan"), float("inf"), -float("inf")):
        pages = encode_pages("triton", torch.full((1, 1, 64, 16), value, device=DEVICE), given.keys)
        assert decode(pages, given.keys).isfinite().all()


def test_a_dense_map_and_additive_stages_of_other_widths(generator) -> None:
    tables = value_tables(generator).to(DEVICE)
    x = torch.randn(2, 2, 64, 16, generator=generator).to(DEVICE)
    assert (encode_pages("triton", x, tables) != encode(x, tables)).float().mean() < 0.01


def test_no_tokens_are_no_pages(generator) -> None:
    tables = value_tables(generator).to(DEVICE)
    assert encode_pages("triton", torch.zeros(2, 2, 0, 16, device=DEVICE), tables).shape == (2, 0, 2, tables.layout.page_bytes)


def test_bad_input_is_named() -> None:
    given = inputs(CASES[0])
    x = torch.zeros(1, 1, 64, 64, device=DEVICE)
    for call, phrase in (
        (lambda: encode_pages("triton", x[..., :8], given.keys), "expected [B, 1, a multiple of 64, 64]"),
        (lambda: encode_pages("triton", x, given.keys), "none were given"),
        (lambda: encode_pages("triton", x, given.keys, (torch.zeros(1, 3, 32), torch.zeros(1, 3, 32))), "expected [1, 64, 32]"),
        (lambda: encode_pages("triton", x.to("meta"), given.keys), "expected one device"),
    ):
        with pytest.raises(KernelError) as caught:
            call()
        assert phrase in str(caught.value)
