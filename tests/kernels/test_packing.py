import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS, SUPPORTED_NBITS, CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.packing import pack_codes, unpack_codes

PARTS = {
    1: [1],
    2: [2],
    3: [2, 1],
    4: [4],
    5: [4, 1],
    6: [4, 2],
    7: [4, 2, 1],
    8: [8],
    9: [8, 1],
    10: [8, 2],
    11: [8, 2, 1],
    12: [8, 4],
}


def dull_pack(codes: list[int], nbits: int) -> bytes:
    """The documented rule, one code at a time."""
    packed, low = b"", 0
    for width in PARTS[nbits]:
        part = bytearray(8 * width)
        for token, code in enumerate(codes):
            part[token * width // 8] |= ((code >> low) % (1 << width)) << (token * width % 8)
        packed, low = packed + bytes(part), low + width
    return packed


@given(nbits=st.sampled_from(SUPPORTED_NBITS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_follows_the_documented_rule(nbits: int, seed: int) -> None:
    codes = torch.randint(0, 1 << nbits, (2, 3, PAGE_TOKENS), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, nbits)
    assert packed.shape == (2, 3, 8 * nbits) and packed.dtype == torch.uint8
    for row, page in zip(codes.flatten(0, 1).tolist(), packed.flatten(0, 1), strict=True):
        assert bytes(page.tolist()) == dull_pack(row, nbits)
    assert torch.equal(unpack_codes(packed, nbits), codes.int())


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_extreme_codes_survive(nbits: int) -> None:
    top = (1 << nbits) - 1
    for codes in (torch.zeros(PAGE_TOKENS), torch.full((PAGE_TOKENS,), top), torch.arange(PAGE_TOKENS) % (top + 1)):
        assert torch.equal(unpack_codes(pack_codes(codes.long(), nbits), nbits), codes.int())


@pytest.mark.parametrize(
    ("call", "phrase"),
    [
        (lambda: pack_codes(torch.full((64,), 16), 4), "codes range over 16..16; expected 0..15"),
        (lambda: pack_codes(torch.full((64,), -1), 4), "expected 0..15"),
        (lambda: pack_codes(torch.zeros(63, dtype=torch.long), 4), "63 tokens; expected 64"),
        (lambda: pack_codes(torch.zeros(64, dtype=torch.long), 13), "nbits is 13"),
        (lambda: unpack_codes(torch.zeros(31, dtype=torch.uint8), 4), "31 bytes; expected 32"),
        (lambda: CodeGroup(0, 8, 2), "0 subspaces"),
        (lambda: CodeGroup(2, 13, 2), "nbits is 13"),
        (lambda: CodeLayout.uniform(80, 32, 8), "80 is not divisible into 32"),
        (lambda: CodeLayout(()), "at least one stage"),
        (lambda: CodeLayout(((CodeGroup(2, 8, 2),), (CodeGroup(2, 8, 4),))), "cover [4, 8] channels"),
        (lambda: RotaryLayout(7), "rotary_dim is 7"),
    ],
)
def test_bad_input_is_named(call, phrase: str) -> None:
    with pytest.raises(KernelError) as caught:
        call()
    assert phrase in str(caught.value)


def test_layout_arithmetic() -> None:
    layout = CodeLayout(((CodeGroup(16, 8, 2), CodeGroup(16, 6, 2)), (CodeGroup(32, 4, 2),)))
    assert layout.head_dim == 64
    assert layout.page_bytes == 8 * (16 * 8 + 16 * 6 + 32 * 4)
    assert layout.bits_per_channel == (16 * 8 + 16 * 6 + 32 * 4) / 64
    assert [(stage, index, at, channel) for stage, index, _, at, channel in layout.spans()] == [
        (0, 0, 0, 0),
        (0, 1, 1024, 32),
        (1, 0, 1024 + 768, 0),
    ]
