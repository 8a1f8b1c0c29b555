import pytest
import torch
from tests_support import key_tables, value_tables

from pqkv_kernels import bench
from pqkv_kernels.bench import gate, quantiles, time_attention
from pqkv_kernels.errors import KernelError


def test_a_shape_is_timed_after_its_gate(generator: torch.Generator) -> None:
    keys, values = key_tables(generator), value_tables(generator)
    found = time_attention(
        keys,
        values,
        group_size=2,
        batch=2,
        context=200,
        backend="torch",
        dtype=torch.float32,
        repeats=3,
        copy_gb_per_s=5.0,
    )
    assert found.context == 192 and found.num_heads == 4 and found.gate_error < 1e-4
    assert found.code_bytes == 2 * 3 * 2 * (keys.layout.page_bytes + values.layout.page_bytes)
    assert found.dense_bytes == 2 * 2 * 2 * 192 * 16 * 4
    assert found.ratio == found.static_ms.p50 / found.codes_ms.p50 and found.bandwidth_share > 0
    row = found.row()
    assert row["codes_gb_per_s"] == pytest.approx(found.code_bytes / found.codes_ms.p50 / 1e6)
    assert row["codes_gb_per_s"] == pytest.approx(row["share_of_copy_bandwidth"] * 5.0)
    assert row["static_gb_per_s"] == pytest.approx(found.dense_bytes / found.static_ms.p50 / 1e6)


def test_wrong_answers_are_never_timed(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    right = bench.attend_codes
    for wrong in (1.02, float("nan")):
        monkeypatch.setattr(bench, "attend_codes", lambda *args, wrong=wrong: (right(*args)[0] * wrong, None))
        with pytest.raises(KernelError, match="the torch backend differs from the reference by .*nothing is timed"):
            gate(key_tables(generator), value_tables(generator), 2, "torch", torch.float32)


def test_quantiles_of_known_times() -> None:
    assert quantiles([3.0]) == bench.Quantiles(3.0, 3.0, 3.0, 3.0, 3.0)
    assert quantiles([float(i) for i in range(11)]) == bench.Quantiles(1.0, 2.0, 5.0, 8.0, 9.0)
