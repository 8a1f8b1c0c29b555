import xml.etree.ElementTree as ET
from typing import Any

import pytest

from pqkv_cli.baselines.run import pareto_document
from pqkv_cli.report.pictures import pareto, pareto_png
from pqkv_cli.report.rows import pareto_table


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


def test_the_picture_is_a_png_even_of_a_loss_of_zero() -> None:
    points = pareto_document([*RECORDS, record("kvquant", 8.0, 0.0)])["points"]
    first = pareto_png(points, "a title")
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert pareto_png(points, "a title") == first
    assert len({first, pareto_png(points, "another"), pareto_png(points[:2], "a title"), pareto_png([], "a title")}) == 4


def test_the_report_has_a_line_for_every_method_and_a_row_for_every_point() -> None:
    points = pareto_document(RECORDS)["points"]
    (picture,) = pareto(points)
    words = [element.text for element in ET.fromstring(picture.svg).iter("text")]
    assert words.index("pqkv") < words.index("kivi") and {"rtn", "million"} <= set(words)
    table = pareto_table(points)
    assert [row[0] for row in table.rows] == ["kivi", "pqkv", "million", "rtn", "kivi"]
    assert table.rows[1] == ["pqkv", "4", "0.01", "0.09", "90.0 %", "7", "yes"]
    assert [row[-1] for row in table.rows] == ["yes", "yes", "yes", "yes", "no"]
    assert (pareto([]), pareto_table([]).rows) == ([], [])
