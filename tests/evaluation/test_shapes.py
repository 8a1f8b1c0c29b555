"""`pqkv bench --shape`: random models of a given shape, measured small."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tape import Capturer

from pqkv_cli.benchmarks import bench_shapes as module
from pqkv_cli.benchmarks.bench_shapes import SPEC, ShapeSettings, bench_shapes, codes_row_bytes
from pqkv_cli.benchmarks.shapes import FORMATS, SHAPES, ModelShape, random_model, random_tables
from pqkv_cli.benchmarks.step_speed import filled, plain_step, time_tokens
from pqkv_cli.cache.storage import BLOCK_PAGES
from pqkv_cli.report.page import shape_page
from pqkv_cli.runtime.attach import Attached
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.pairs import planes_of

CPU = torch.device("cpu")
TINY = ModelShape(1, 32, 48, 4, 2, 16, 64)


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, label: str) -> Any:
        return nullcontext(lambda done, total: None)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    settings = ShapeSettings(("tiny",), (128, 256, 65536), (1, 2), 1, "torch", "cpu", memory_bytes=300_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHAPES", {"tiny": TINY})
        patch.setattr(module, "_CPU_BYTES", 2_000_000)
        return bench_shapes(settings, Silent()).document()


def test_every_format_is_measured_where_it_fits(document: dict[str, Any]) -> None:
    found = {(row["format"], row["batch"], row["context"]) for row in document["attention"]}
    assert found == {(label, batch, context) for label in FORMATS for batch in (1, 2) for context in (128, 256)}
    assert all(row["gate_error"] < 0.01 and row["ratio_to_static"] > 0 for row in document["attention"])
    assert {(row["format"], row["context"]) for row in document["tokens"]} == {(f, c) for f in FORMATS for c in (128, 256)}
    for row in document["tokens"]:
        assert row["ratios"]["StaticCache"] == row["ms_per_token"]["StaticCache"]["p50"] / row["ms_per_token"]["pqkv"]["p50"]
        # Few tokens of a tiny head: tables of positions weigh more than codes save, but dense bytes are exact.
        assert row["cache_bytes"]["DynamicCache"] == 2 * 2 * (row["context"] + 4) * 16 * 4
    assert {row["format"] for row in document["encoding"]} == set(FORMATS)
    for row in document["encoding"]:
        plain = row["prefill_ms"]["p50"]
        assert row["tokens"] == 256 and row["share"] == row["encode_ms"]["p50"] / plain > 0
        assert row["overhead"] == row["codes_prefill_ms"]["p50"] / plain - 1
    assert any("tiny, batch 2, 65536 tokens: needs 0.1 GB of 0.0 GB" in why for why in document["skipped"])
    assert "fp8" in document["missing"] and document["backend"] == "torch"


def test_the_kernels_of_triton_pass_the_gate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAPES", {"tiny": TINY})
    settings = ShapeSettings(("tiny",), repeats=1, backend="triton", device="cpu")
    rows = {row["format"]: row for _, row in module._Bench(CPU, torch.float32, settings, []).attention("tiny", (128,), (1,))}
    assert list(rows) == list(FORMATS)
    assert all(row["gate_error"] < 1e-4 for row in rows.values())


def test_equal_memory_compares_the_largest_batches_that_fit(document: dict[str, Any]) -> None:
    assert {(row["format"], row["context"]) for row in document["equal_memory"]} == {
        (f, c) for f in FORMATS for c in (128, 256)
    }
    for row in document["equal_memory"]:
        for side in ("static", "codes"):
            found = row[side]
            assert found["cache_bytes"] <= row["budget_bytes"] == 300_000, "what is measured fits"
            assert found["tokens_per_s"] == found["batch"] / found["ms_per_step"]["p50"] * 1e3
        assert row["static"]["batch"] == 300_000 // (2 * 2 * 16 * 4 * (row["context"] + 5))
        assert row["static"]["cache_bytes"] + row["static"]["cache_bytes"] // row["static"]["batch"] > 300_000
        assert row["ratio"] == row["codes"]["tokens_per_s"] / row["static"]["tokens_per_s"]
    assert any("tiny, uncompressed, equal memory: a row of 65536 tokens needs" in why for why in document["skipped"])


@pytest.mark.parametrize(("context", "steps"), [(64, 0), (700, 0), (1024, 70), (640, 130)])
def test_footprints_are_what_caches_weigh(context: int, steps: int) -> None:
    keys, values = random_tables(TINY, "speed 4 b/ch", CPU)
    model = random_model(TINY, 2048, CPU, torch.float32)
    with Attached(model, [{"keys": keys, "values": values}], SPEC, backend="torch") as attached, torch.no_grad():
        cache = filled(model, attached.new_cache(), context, batch=3)
        for step in range(steps):
            plain_step(model, torch.ones(3, 1, dtype=torch.int64), cache, context + step)
        found = cache.num_bytes().total
    most = 3 * codes_row_bytes(TINY, keys, values, SPEC, context + steps, 4)
    block = 3 * BLOCK_PAGES * TINY.num_kv_heads * (keys.layout.page_bytes + values.layout.page_bytes)
    window = 3 * 2 * TINY.num_kv_heads * TINY.head_dim * 4 * 3 * PAGE_TOKENS
    assert most - block - window <= found <= most


def test_the_picture_has_a_line_for_every_cache(document: dict[str, Any]) -> None:
    page = shape_page(document)
    for label in FORMATS:
        assert f"pqkv, {label}" in page
    assert "DynamicCache" in page and "tiny: memory" in page and page.count("<svg") == 2
    alone = shape_page(document | {"tokens": ()})  # attention alone, where no model fitted
    assert "static cache" in alone and "attention of one layer" in alone


def test_formats_have_the_rates_they_are_named_for() -> None:
    for label in FORMATS:
        for shape in SHAPES.values():
            keys, values = random_tables(shape, label, CPU) if shape.num_kv_heads < 9 else (None, None)
            if keys is not None and values is not None:
                assert keys.layout.bits_per_channel == values.layout.bits_per_channel == float(label.split()[1])
                assert keys.rotary is not None and values.rotary is None
                assert planes_of(keys) is not None and planes_of(values) is not None  # read by the fast kernels


def test_captured_steps_are_timed_where_there_are_graphs() -> None:
    keys, values = random_tables(TINY, "speed 4 b/ch", CPU)
    model = random_model(TINY, 2048, CPU, torch.float32)
    with Attached(model, [{"keys": keys, "values": values}], SPEC, backend="torch") as attached:
        plain = time_tokens(attached, 200, 1)
        found = time_tokens(attached, 200, 1, Capturer())
        assert model.config._attn_implementation == "pqkv" and "forward" not in vars(model)
    names = {"pqkv, captured", "StaticCache, captured"}
    assert {name: plain.missing[name] for name in names} == dict.fromkeys(names, "the device is cpu and graphs are CUDA's")
    assert names <= set(found.ms_per_token) and not names & set(found.missing)
    ms = found.ms_per_token
    assert found.ratio("StaticCache, captured") == ms["StaticCache, captured"].p50 / ms["pqkv, captured"].p50
    assert found.ratio("StaticCache") == ms["StaticCache"].p50 / ms["pqkv"].p50
