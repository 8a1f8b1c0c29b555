"""Tables of bytes round centroids, and nothing else."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, inputs
from test_code_attention import SCALING, close, reference

from pqkv_kernels.format.pairs import planes_of
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.config import DecodeConfig
from pqkv_kernels.gpu.tables import _plane_of_entry, device_tables
from pqkv_kernels.reference.attention import code_queries, leave_code_space

CASES = [
    Case(nbits, dim, tokens, group, turn, unequal, None, "fast", queries, torch.float32)
    for nbits, dim, tokens, group, turn, unequal, queries in (
        ("8", 64, 130, 1, "pages", True, 1),
        ("4,4", 64, 257, 4, "pages", False, 1),
        ("4,4,2", 80, 63, 2, "tokens", True, 1),
        ("w8,4", 64, 130, 4, "post", False, 3),
        ("8+6+4", 96, 130, 1, "interleaved", True, 1),
        ("10", 64, 65, 7, "partial", False, 3),
        ("4", 80, 63, 7, "interleaved", True, 3),
        ("4,4,4", 64, 130, 1, "post", True, 1),
        ("4x4,4x4", 128, 130, 4, "pages", True, 1),
        ("4x6,4x6", 96, 65, 1, "tokens", False, 17),
        ("4x4", 80, 65, 4, "partial", False, 1),
    )
]


def attended(given, tables: str):
    from pqkv_kernels.gpu.attention import triton_attention

    out, lse = triton_attention(
        code_queries(given.query, given.keys),
        *(given.key_pages, given.value_pages, given.keys, given.values, given.spans),
        *(SCALING, given.angles, None, DecodeConfig(tables=tables)),
    )
    return leave_code_space(out, given.values), lse.flatten(1, 2)


def rounded_in_float32(tables: CodecTables) -> None:
    """Let the kernel with tables in float32 read the numbers that bytes hold."""
    steps, planes = device_tables(tables, "int8").scale, planes_of(tables)
    assert planes is not None
    for stage in planes.stages:
        entries = stage.entries.view(torch.float32).view(-1, 2)
        step = steps.flatten()[_plane_of_entry(stage, planes)][:, None]
        entries.copy_((entries / step).round() * step)
    device_tables(tables, "float32")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_read_as_the_numbers_they_stand_for(case: Case) -> None:
    given = inputs(case, heads=2)
    rounded_in_float32(given.keys)
    rounded_in_float32(given.values)
    close(attended(given, "int8"), attended(given, "float32"), 5e-2)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_other_numbers_are_rounded_to_255_steps(case: Case) -> None:
    given = inputs(case, heads=2)
    (found, _), (expected, _) = attended(given, "int8"), reference(given, None)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 0 < error < 0.02
    (found, _) = attended(given, "float16")
    assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < error


def test_tables_of_zeros_stay_zeros() -> None:
    given = inputs(CASES[0], heads=2)
    nothing = tuple(tuple(torch.zeros_like(table) for table in stage) for stage in given.values.codebooks)
    tables = device_tables(replace(given.values, codebooks=nothing), "int8")
    assert (tables.entries.view(torch.uint8) == 128).all() and (tables.scale > 0).all()
