import sys
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.evaluation.pareto import can_draw, draw_pareto, pareto_document


def record(method: str, bits: float, kl: float, sha: str | None = None, status: str = "complete") -> dict[str, Any]:
    return {
        "method": method,
        "native_bits": round(bits),
        "status": status,
        "artifact_sha256": sha,
        "bits_per_channel": {"total": bits},
        "metrics": {
            "kl_bits": {"quantized": kl, "p99": 9 * kl},
            "top1_agreement": {"quantized": 0.9},
            "perplexity": {"quantized": 7.0},
        },
    }


RECORDS = [
    record("pqkv", 4.0, 0.01, "f" * 64),
    record("kivi", 5.0, 0.02),
    record("kivi", 3.0, 0.40),
    record("rtn", 4.5, 0.005),
    record("million", 4.0, 0.01),
    record("rotatekv", 2.0, 0.0, status="unavailable"),
]


def test_the_front_holds_what_nothing_beats() -> None:
    document = pareto_document(RECORDS)
    front = [(p["method"], p["bits_per_channel"]) for p in document["points"] if p["on_front"]]
    assert front == [("pqkv", 4.0), ("kivi", 3.0), ("rtn", 4.5), ("million", 4.0)]  # equals beat each other not
    assert len(document["points"]) == 5
    assert document["points"][0] == {
        "method": "pqkv",
        "native_bits": 4,
        "bits_per_channel": 4.0,
        "kl_bits": 0.01,
        "kl_bits_p99": pytest.approx(0.09),
        "top1_agreement": 0.9,
        "perplexity": 7.0,
        "artifact_sha256": "f" * 64,
        "on_front": True,
    }


def test_the_picture_is_a_png_even_of_a_loss_of_zero(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = pareto_document([*RECORDS, record("kvquant", 8.0, 0.0)])["points"]
    draw_pareto(points, "a title", tmp_path / "new" / "picture.png")
    first = (tmp_path / "new" / "picture.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    draw_pareto(points, "a title", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    draw_pareto(points[:2], "a title", tmp_path / "less.png")
    assert (tmp_path / "less.png").read_bytes() != first


def test_without_matplotlib_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_draw()
