import pytest
import torch
from tests_support import dull_attention, key_tables, random_angles, value_tables

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.tokens import CodedTokens
from pqkv_kernels.reference.attention import code_attention, code_queries, exact_attention, leave_code_space, merge
from pqkv_kernels.reference.encode import decode, encode


def coded(generator: torch.Generator, batch: int, num_pages: int, heads: int = 2, dim: int = 16):
    """Random coded keys and values with their angles and decoded twins."""
    keys, values = key_tables(generator, heads, dim), value_tables(generator, heads, dim)
    angles = random_angles(RotaryLayout(dim), (batch, 64 * num_pages), generator)
    key_pages = encode(torch.randn(batch, heads, 64 * num_pages, dim, generator=generator), keys, angles)
    value_pages = encode(torch.randn(batch, heads, 64 * num_pages, dim, generator=generator), values)
    return keys, values, angles, key_pages, value_pages, decode(key_pages, keys, angles), decode(value_pages, values)


@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("num_pages", [1, 3, 33])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_over_codes_equals_attention_over_decoded_vectors(
    generator: torch.Generator, groups: int, num_pages: int, softcap: float | None
) -> None:
    keys, values, angles, key_pages, value_pages, decoded_keys, decoded_values = coded(generator, 3, num_pages)
    query = torch.randn(3, 2 * groups, 2, 16, generator=generator)
    stop = 64 * num_pages
    spans = torch.tensor([[0, stop], [5, stop - 9], [stop - 1, stop + 70]])
    tokens = CodedTokens([key_pages], [value_pages], keys, values, spans, angles)
    output, lse = code_attention(code_queries(query, keys), tokens, 0.3, softcap)
    index = torch.arange(stop)
    valid = ((index >= spans[:, :1]) & (index < spans[:, 1:]))[:, None]
    expected = dull_attention(query, decoded_keys, decoded_values, valid, 0.3, softcap)
    torch.testing.assert_close(leave_code_space(output, values).double(), expected, atol=2e-4, rtol=2e-4)
    assert lse.shape == (3, 2, groups, 2)


def test_rows_without_coded_tokens_are_neutral(generator: torch.Generator) -> None:
    keys, values, angles, key_pages, value_pages, *_ = coded(generator, 2, 1)
    query = torch.randn(2, 4, 1, 16, generator=generator)
    tokens = CodedTokens([key_pages], [value_pages], keys, values, torch.tensor([[64, 99], [7, 7]]), angles)
    output, lse = code_attention(code_queries(query, keys), tokens, 0.3)
    assert torch.equal(output, torch.zeros_like(output)) and bool((lse == -torch.inf).all())


def test_no_pages_at_all_is_neutral(generator: torch.Generator) -> None:
    keys, values, angles, key_pages, value_pages, *_ = coded(generator, 2, 1)
    query = code_queries(torch.randn(2, 4, 1, 16, generator=generator), keys)
    tokens = CodedTokens([key_pages[:, :0]], [value_pages[:, :0]], keys, values, torch.zeros(2, 2).long(), angles)
    output, lse = code_attention(query, tokens, 0.3)
    assert output.shape == query.shape and bool((lse == -torch.inf).all())


def test_merged_parts_equal_the_whole(generator: torch.Generator) -> None:
    query = torch.randn(2, 4, 3, 16, generator=generator)
    keys, values = (torch.randn(2, 2, 20, 16, generator=generator) for _ in range(2))
    valid = torch.rand(2, 3, 20, generator=generator) > 0.4
    valid[0, 0] = False  # a query that sees nothing, as those of padding do
    parts = [
        exact_attention(query, keys[:, :, s], values[:, :, s], valid[:, :, s], 0.25)
        for s in (slice(0, 3), slice(3, 3), slice(3, 20))
    ]
    output, lse = merge(parts)
    torch.testing.assert_close(output.double(), dull_attention(query, keys, values, valid, 0.25), atol=1e-5, rtol=1e-5)
    assert torch.equal(output[0, :, 0], torch.zeros(4, 16)) and bool((lse[0, :, 0] == -torch.inf).all())


def test_mismatched_pages_are_refused(generator: torch.Generator) -> None:
    keys, values, angles, key_pages, value_pages, *_ = coded(generator, 1, 2)
    query = code_queries(torch.randn(1, 2, 1, 16, generator=generator), keys)
    with pytest.raises(KernelError, match="expected equal B, P, Hkv"):
        code_attention(
            query, CodedTokens([key_pages], [value_pages[:, :1]], keys, values, torch.tensor([[0, 64]]), angles), 0.3
        )
