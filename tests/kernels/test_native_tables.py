"""Codebooks in the forms that the C++ kernel reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_kernels.cpu import build as native_build
from pqkv_kernels.cpu.attention import byte_planes


def floats_of(planes: torch.Tensor, entries: int) -> torch.Tensor:
    """What bytes [..., 2, 3, K] stand for, [..., entries, 2]: the lowest byte of a float is zero."""
    upper = planes[..., :entries].movedim(-1, -3)
    return torch.nn.functional.pad(upper, (1, 0)).contiguous().view(torch.float32)[..., 0]


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=2, max_size=40))
@settings(deadline=None)
def test_half_precision_keeps_its_value(numbers: list[float]) -> None:
    table = torch.tensor(numbers[: len(numbers) // 2 * 2]).view(-1, 2)
    assert torch.equal(floats_of(byte_planes(table), len(table)), table)


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False), min_size=2, max_size=40))
@settings(deadline=None)
def test_other_floats_are_rounded_to_sixteen_bits(numbers: list[float]) -> None:
    table = torch.tensor(numbers[: len(numbers) // 2 * 2]).view(-1, 2)
    found = floats_of(byte_planes(table), len(table))
    torch.testing.assert_close(found, table, rtol=2.0**-16, atol=0)


@pytest.mark.parametrize(("entries", "width"), [(2, 128), (128, 128), (512, 512)])
def test_small_tables_are_filled_up(entries: int, width: int) -> None:
    assert byte_planes(torch.randn(3, entries, 2)).shape == (3, 2, 3, width)


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ("AVX512", "flags : avx512f avx512vbmi", "AVX512_VBMI"),
        ("AVX512", "flags : avx512f avx512_vbmi2", "AVX512"),
        ("AVX2", "flags : avx512vbmi", "AVX2"),
        ("AVX512", None, "AVX512"),
    ],
)
def test_bytes_are_looked_up_only_where_the_processor_says_so(capability, flags, expected, tmp_path, monkeypatch) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(native_build, "_PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(native_build.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert native_build.machine.__wrapped__() == expected
