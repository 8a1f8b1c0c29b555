"""`pqkv bench --shape`: random models of a given shape, measured small."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from pqkv_cli.evaluation.shape_picture import shape_picture
from pqkv_cli.evaluation.shapes import FORMATS, SHAPES, ModelShape, random_tables
from pqkv_cli.pipeline import bench_shapes as module
from pqkv_cli.pipeline.bench_shapes import bench_shapes
from pqkv_kernels.planes import planes_of

CPU = torch.device("cpu")


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, label: str) -> Any:
        return nullcontext(lambda done, total: None)


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(module, "SHAPES", {"tiny": ModelShape(1, 32, 48, 4, 2, 16, 64)})
    monkeypatch.setattr(module, "_CPU_BYTES", 2_000_000)
    return bench_shapes(["tiny"], [128, 256, 65536], [1, 2], 1, "torch", Silent(), CPU).document()


def test_every_format_is_measured_where_it_fits(document: dict[str, Any]) -> None:
    found = {(row["format"], row["batch"], row["context"]) for row in document["attention"]}
    assert found == {(label, batch, context) for label in FORMATS for batch in (1, 2) for context in (128, 256)}
    assert all(row["gate_error"] < 0.01 and row["ratio_to_static"] > 0 for row in document["attention"])
    assert {(row["format"], row["context"]) for row in document["tokens"]} == {(f, c) for f in FORMATS for c in (128, 256)}
    for row in document["tokens"]:
        assert row["ratios"]["StaticCache"] == row["ms_per_token"]["StaticCache"]["p50"] / row["ms_per_token"]["pqkv"]["p50"]
        # Few tokens of a tiny head: tables of positions weigh more than codes save, but dense bytes are exact.
        assert row["cache_bytes"]["DynamicCache"] == 2 * 2 * (row["context"] + 3) * 16 * 4
    assert {row["format"] for row in document["encoding"]} == set(FORMATS)
    assert all(row["share"] == row["encode_ms"] / row["prefill_ms"] > 0 for row in document["encoding"])
    assert any("tiny, batch 2, 65536 tokens: needs 0.1 GB of 0.0 GB" in why for why in document["skipped"])
    assert "fp8" in document["missing"] and document["backend"] == "torch"


def test_the_picture_has_a_line_for_every_cache(document: dict[str, Any]) -> None:
    page = shape_picture(document)
    for label in FORMATS:
        assert f"pqkv, {label}" in page
    assert "DynamicCache" in page and "tiny: memory" in page and page.count("<svg") == 2
    alone = shape_picture(document | {"tokens": ()})  # attention alone, where no model fitted
    assert "static cache" in alone and "attention of one layer" in alone


def test_formats_have_the_rates_they_are_named_for() -> None:
    for label in FORMATS:
        for shape in SHAPES.values():
            keys, values = random_tables(shape, label, CPU) if shape.num_kv_heads < 9 else (None, None)
            if keys is not None and values is not None:
                assert keys.layout.bits_per_channel == values.layout.bits_per_channel == float(label.split()[1])
                assert keys.rotary is not None and values.rotary is None
                assert planes_of(keys) is not None and planes_of(values) is not None  # read by the fast kernels
