"""Scores by looking up products with centroids are those of the decoded keys."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, Case, inputs
from test_code_attention import SCALING, close, reference

from pqkv_kernels.dispatch import attend_codes
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.pairs import planes_of
from pqkv_kernels.gpu.config import EXACT, DecodeConfig
from pqkv_kernels.reference.attention import code_queries, leave_code_space
from pqkv_kernels.reference.encode import decode
from pqkv_kernels.reference.score_tables import score_rows, score_tables, table_scores

FORMATS = ("1", "3", "4", "7", "8", "10", "8+6+4", "4,4", "w8,4", "w10,8+6")


def plane_rows(case_inputs, queries):
    """Queries [B, H, N, D] in the order of the key's planes."""
    planes = planes_of(case_inputs.keys)
    coded = code_queries(queries, case_inputs.keys).flatten(2, 3)
    channels = planes.channels[None, :, None].flatten(3).expand(*coded.shape[:3], -1)
    return planes, coded.gather(3, channels).unflatten(-1, (-1, 2))


@given(nbits=st.sampled_from(FORMATS), dim=st.sampled_from([64, 80]), seed=st.integers(0, 2**31), group=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_looked_up_score_is_the_product_with_the_decoded_key(nbits: str, dim: int, seed: int, group: int) -> None:
    given_inputs = inputs(Case(nbits, dim, 128, group, "post", True, None, "exact", 1, torch.float32), heads=2)
    query = torch.randn(given_inputs.query.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    planes, rows = plane_rows(given_inputs, query)
    pages, _ = given_inputs.pages
    found = table_scores(pages, planes, score_tables(rows, planes))
    keys = decode(pages, given_inputs.keys)
    expected = query.unflatten(1, (2, group))[:, :, :, 0] @ keys.mT
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("nbits", FORMATS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_kernel_looks_up_where_its_configuration_says_so(nbits: str, softcap: float | None) -> None:
    from pqkv_kernels.gpu.attention import triton_attention

    given_inputs = inputs(Case(nbits, 64, 130, 1, "post", True, softcap, "exact", 1, torch.float32), heads=2)
    config = replace(EXACT, key_scores="table", min_split_pages=1)
    coded = code_queries(given_inputs.query, given_inputs.keys)
    out, lse = triton_attention(coded, given_inputs.tokens, SCALING, softcap, config)
    close((leave_code_space(out, given_inputs.values), lse.flatten(1, 2)), reference(given_inputs, softcap), 2e-4)


@pytest.mark.parametrize("nbits", FORMATS)
def test_torch_looks_up_for_one_query(nbits: str) -> None:
    given_inputs = inputs(Case(nbits, 64, 130, 1, "post", True, None, "exact", 1, torch.float32), heads=2)
    close(attend_codes("torch", given_inputs.query, given_inputs.tokens, SCALING), reference(given_inputs, None), 2e-4)


@pytest.mark.parametrize(("group", "turn"), [(4, "post"), (1, "pages")])
def test_several_queries_and_turned_keys_are_decoded_whatever_it_says(group: int, turn: str) -> None:
    from pqkv_kernels.gpu.attention import triton_attention

    given_inputs = inputs(Case("8", 64, 130, group, turn, True, None, "exact", 1, torch.float32), heads=2)
    config = replace(EXACT, key_scores="table")
    coded = code_queries(given_inputs.query, given_inputs.keys)
    out, lse = triton_attention(coded, given_inputs.tokens, SCALING, None, config)
    close((leave_code_space(out, given_inputs.values), lse.flatten(1, 2)), reference(given_inputs, None), 2e-4)


def test_rows_point_at_the_first_plane_of_every_code() -> None:
    given_inputs = inputs(Case("w8,4", 64, 64, 1, "post", False, None, "exact", 1, torch.float32))
    rows = score_rows(planes_of(given_inputs.keys))
    assert rows[0].tolist() == [0] + [-1] * 31 and rows[1].tolist() == [256 + 16 * i for i in range(32)]
    with pytest.raises(KernelError, match="key_scores is 'both'; expected decode or table"):
        DecodeConfig(key_scores="both")  # type: ignore[arg-type]
