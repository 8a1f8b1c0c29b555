import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import key_tables, random_angles, random_codebooks, value_tables

from pqkv_kernels.cpu.encode import NativeEncoder
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import SUPPORTED_NBITS, CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.rotary import rotate, unit_angles, unrotate
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import decode, dequantize, encode, from_code_space, quantize, round_trip, to_code_space


@given(
    nbits=st.sampled_from(SUPPORTED_NBITS),
    subspace_dim=st.sampled_from([1, 2, 4, 8]),
    heads=st.integers(1, 3),
    num_tokens=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_centroids_encode_to_themselves(nbits: int, subspace_dim: int, heads: int, num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = CodeLayout.uniform(16, 16 // subspace_dim, nbits)
    codebooks = random_codebooks(layout, heads, generator)
    codes = [torch.randint(0, 1 << nbits, (2, heads, 16 // subspace_dim, num_tokens), generator=generator)]
    vectors = dequantize(codes, layout, codebooks)
    assert vectors.shape == (2, heads, num_tokens, 16)
    again = dequantize(quantize(vectors, layout, codebooks), layout, codebooks)
    # Of centroids that nearly touch, fp32 scores may choose the other one.
    assert torch.allclose(again, vectors, rtol=0, atol=3e-3)


def test_quantize_equals_a_dull_search(generator: torch.Generator) -> None:
    layout = CodeLayout(((CodeGroup(2, 3, 4), CodeGroup(4, 5, 2)), (CodeGroup(16, 2, 1),)))
    codebooks = random_codebooks(layout, 2, generator)
    x = torch.randn(1, 2, 7, 16, generator=generator)
    residual, found = x.clone(), dequantize(quantize(x, layout, codebooks), layout, codebooks)
    for stage, tables in zip(layout.stages, codebooks, strict=True):
        offset = 0
        decoded = torch.zeros_like(x)
        for group, table in zip(stage, tables, strict=True):
            for m in range(group.num_subspaces):
                channels = slice(offset, offset + group.subspace_dim)
                for head in range(2):
                    for t in range(7):
                        distance = (table[head, m].float() - residual[0, head, t, channels]).square().sum(-1)
                        decoded[0, head, t, channels] = table[head, m, distance.argmin()].float()
                offset += group.subspace_dim
        residual = residual - decoded
    torch.testing.assert_close(found, x - residual)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_rotation_is_undone(generator: torch.Generator, interleaved: bool, rotary_dim: int) -> None:
    layout = RotaryLayout(rotary_dim, interleaved)
    x = torch.randn(2, 5, 16, generator=generator)
    cos, sin = random_angles(layout, (2, 5), generator)
    torch.testing.assert_close(unrotate(rotate(x, cos, sin, layout), cos, sin, layout), x)
    for pair, (i, j) in enumerate(layout.pairs()):
        turned = rotate(x, cos, sin, layout)
        torch.testing.assert_close(turned[..., i], x[..., i] * cos[..., pair] - x[..., j] * sin[..., pair])
        torch.testing.assert_close(turned[..., j], x[..., j] * cos[..., pair] + x[..., i] * sin[..., pair])
    assert torch.equal(rotate(x, cos, sin, layout)[..., rotary_dim:], x[..., rotary_dim:])


def test_attention_scaling_is_left_in_the_keys(generator: torch.Generator) -> None:
    layout = RotaryLayout(8)
    cos, sin = random_angles(layout, (1, 3), generator)
    doubled = torch.cat((cos, cos), -1) * 1.7, torch.cat((sin, sin), -1) * 1.7
    unit_cos, unit_sin = unit_angles(*doubled, layout)
    torch.testing.assert_close(unit_cos, cos)
    torch.testing.assert_close(unit_sin, sin)


@pytest.mark.parametrize("make", [key_tables, value_tables])
@pytest.mark.parametrize("num_pages", [0, 1, 3])
def test_encoding_pages_equals_the_unpacked_round_trip(generator: torch.Generator, make, num_pages: int) -> None:
    tables = make(generator)
    x = torch.randn(2, tables.num_heads, 64 * num_pages, tables.layout.head_dim, generator=generator)
    angles = random_angles(RotaryLayout(16), (2, 64 * num_pages), generator) if tables.rotary else None
    pages = encode(x, tables, angles)
    assert pages.shape == (2, num_pages, tables.num_heads, tables.layout.page_bytes)
    torch.testing.assert_close(decode(pages, tables, angles), round_trip(x, tables, angles))


def test_position_does_not_change_the_code_of_a_key_before_rotation(generator: torch.Generator) -> None:
    tables = key_tables(generator)
    key = torch.randn(1, tables.num_heads, 64, 16, generator=generator)
    pages = []
    for _ in range(2):
        cos, sin = random_angles(tables.rotary, (1, 64), generator)
        pages.append(encode(rotate(key, cos[:, None], sin[:, None], tables.rotary), tables, (cos, sin)))
    assert (pages[0] != pages[1]).float().mean() < 0.01  # rounding in a rotation may tip a tie


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("map_kind", ["blocks", "scale", None])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(16, False), (16, True), (8, False), (None, False)])
def test_the_loop_reaches_the_code_space_of_torch(
    generator: torch.Generator,
    rotary_dim: int | None,
    interleaved: bool,
    map_kind,
    rotated: bool,
) -> None:
    rotary = None if rotary_dim is None else RotaryLayout(rotary_dim, interleaved)
    maps = {"scale": 0.5 + torch.rand(3, 16, generator=generator), None: None}
    maps["blocks"] = None if rotary is None else torch.randn(3, 8, 2, 2, generator=generator)
    layout = CodeLayout.uniform(16, 4, 3)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(3)])
    tables = CodecTables(layout, random_codebooks(layout, 3, generator), maps[map_kind], order.to(torch.int16), rotary)
    x = torch.randn(2, 70, 3, 16, generator=generator).transpose(1, 2)  # as projections come
    angles = None if rotary is None else random_angles(rotary, (1, 70), generator)
    fast = NativeEncoder().to_code_space(x, tables, angles, rotated=rotated)
    torch.testing.assert_close(fast, to_code_space(x, tables, angles, rotated=rotated), rtol=1e-5, atol=1e-5)


def test_gradients_pass_to_the_vectors(generator: torch.Generator) -> None:
    tables = key_tables(generator)
    x = torch.randn(1, tables.num_heads, 5, 16, generator=generator, requires_grad=True)
    to_code_space(x, tables, rotated=False).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_bad_input_is_named(generator: torch.Generator) -> None:
    tables = key_tables(generator)
    layout = tables.layout
    x = torch.randn(1, tables.num_heads, 64, 16, generator=generator)
    cases = [
        (lambda: encode(x[:, :, :63], tables), "63 tokens to encode; expected a multiple of 64"),
        (lambda: encode(x, tables), "need the angles"),
        (lambda: encode(x[..., :8], tables), "expected [B, 2, T, 16]"),
        (lambda: encode(x, tables, (torch.ones(1, 63, 8), torch.zeros(1, 63, 8))), "expected [1, 64, 8]"),
        (lambda: decode(torch.zeros(1, 1, 2, 5, dtype=torch.uint8), tables), "pages have shape"),
        (lambda: CodecTables(layout, ((torch.zeros(2, 1, 1, 1),),)), "codebook 0.0 has shape"),
        (lambda: CodecTables(layout, tables.codebooks, map=torch.ones(3, 16)), "map has shape"),
        (lambda: CodecTables(layout, tables.codebooks, permutation=torch.zeros(2, 3)), "permutation has shape"),
        (lambda: CodecTables(layout, tables.codebooks, rotary=RotaryLayout(32)), "rotary_dim <= head_dim"),
    ]
    for call, phrase in cases:
        with pytest.raises(KernelError) as caught:
            call()
        assert phrase in str(caught.value)


def test_what_undoes_a_permutation_is_sorted_once_and_lets_gradients_pass(generator: torch.Generator) -> None:
    layout = CodeLayout.uniform(8, num_subspaces=4, nbits=4)
    permutation = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)]).to(torch.int16)
    tables = CodecTables(layout, random_codebooks(layout, 2, generator), permutation=permutation)
    with torch.inference_mode():
        first = tables.inverse_permutation()
    assert tables.inverse_permutation() is first
    x = torch.randn(1, 2, 5, 8, generator=generator, requires_grad=True)
    back = from_code_space(to_code_space(x, tables), tables)
    assert torch.equal(back, x)
    back.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
