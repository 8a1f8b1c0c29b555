"""``pqkv bench`` on a tiny model: small, but it really measures."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run: a bench keeps its record in it."""
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def test_it_measures_beside_dense_caches(run: Path, pqkv: Callable) -> None:
    answer = pqkv("bench", run, "--context", 128, "--context", 70, "--repeats", 2, "--json", "-")
    assert answer.code == 0, answer.err
    record = answer.json
    assert record["schema"] == "pqkv.bench/1" and record["environment"]["device"]
    assert [row["context"] for row in record["attention"]] == [128, 64]
    kept = json.loads((run / "results" / "bench.json").read_text(encoding="utf-8"))
    assert kept == {name: value for name, value in record.items() if name != "pqkv"}
    for row in record["attention"]:
        assert row["gate_error"] < 0.01 and row["codes_ms"]["p50"] > 0 and row["ratio_to_static"] > 0
    for row in record["tokens"]:
        assert {"pqkv", "DynamicCache", "StaticCache"} <= set(row["ms_per_token"])
        assert row["ratios"]["DynamicCache"] == row["ms_per_token"]["DynamicCache"]["p50"] / row["ms_per_token"]["pqkv"]["p50"]
        assert ("QuantizedCache" in row["ms_per_token"]) != ("QuantizedCache" in row["missing"])


def test_inspect_says_what_attends(run: Path, pqkv: Callable) -> None:
    backend = pqkv("inspect", run, "--json", "-").json["backend"]
    assert backend["name"] in ("torch", "native", "triton") and backend["reason"]


def test_the_tables_are_for_people(run: Path, pqkv: Callable) -> None:
    answer = pqkv("bench", run, "--context", 64, "--repeats", 1)
    assert "whole decode steps" in answer.out and "decode attention of one layer, backend" in answer.out


def test_kmeans_beside_faiss(run: Path, pqkv: Callable) -> None:
    answer = pqkv("bench", run, "--kmeans", "--json", "-")
    if importlib.util.find_spec("faiss") is None:
        assert answer.code == 2 and "pqkv[faiss]" in answer.err
        return
    assert answer.code == 0, answer.err
    assert {row["points"] for row in answer.json["rows"]} == {"keys", "values", "normal"}
    assert all(row["seconds"] > 0 and row["distortion_ratio"] < 1.05 for row in answer.json["rows"])
