"""The report: everything in one file, numbers where they belong, words escaped, contrast that can be read."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from pqkv_cli.artifact.summary import summarize
from pqkv_cli.evaluation.report import ReportSource, report_page
from pqkv_cli.evaluation.report_pictures import compressed_bytes
from pqkv_cli.evaluation.report_style import STYLE
from pqkv_cli.evaluation.report_svg import Axis, heat_map, line_chart, ticks
from pqkv_cli.evaluation.report_tables import headline_rows, number, percent, size
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.tasks import run_task

Maker = Callable[..., Subject]


def record(task: str = "perplexity", mode: str = "all", **changes: Any) -> dict[str, Any]:
    cell = {"from": 1, "to": 128, "kl_bits": 0.01}
    return {
        "task": task,
        "mode": mode,
        "status": "complete",
        "bits_per_channel": {"total": 4.03},
        "cache_bytes": {"baseline": 4096, "quantized": 1024, "num_tokens": 77},
        "headline": ["kl_bits"],
        "metrics": {
            "kl_bits": {"quantized": 0.0123, "ci95": [0.01, 0.015]},
            "top1_agreement": {"quantized": 0.951},
            "by_context": [cell, {**cell, "to": 256, "kl_bits": 0.02}],
        },
        "cost": {},
        "settings": {"seed": 0, "context": 256},
        "environment": {"device": "cpu: x", "torch": "2", "transformers": "5"},
    } | changes


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(subject: Maker, records: list[dict[str, Any]], **fields: Any) -> tuple[str, Page]:
    artifact = subject().artifact
    text = report_page(ReportSource(artifact.header, summarize(artifact), records, **fields))
    return text, Page(text)


def test_a_page_of_real_records(subject: Maker) -> None:
    made = subject()
    settings = {mode: EvaluationSettings(mode, context=256, limit=1) for mode in ("all", "cache")}  # type: ignore[arg-type]
    records = [run_task(task, made, settings[mode], lambda d, t: None) for task in ("kld", "passkey") for mode in settings]
    text, seen = page(subject, records)
    assert seen.open == []
    for phrase in ("kld: kl_bits", "passkey: accuracy", "Layers and heads", "Memory against context", "prompt length, tokens"):
        assert phrase in seen.words
    assert number(records[0]["metrics"]["kl_bits"]["quantized"]) in seen.words
    assert size(records[1]["cache_bytes"]["quantized"]) in seen.words


def test_an_interval_is_written_as_what_it_belongs_to() -> None:
    recovered = {"baseline": 3.0, "quantized": 3.1, "recovery": 1.0333, "ci95": [0.9447, 1.101]}
    alone = {"baseline": 3.0, "quantized": 3.1, "recovery": 1.0333, "ci95": None}
    made = record(headline=["score", "alone", "kl_bits"], metrics=record()["metrics"] | {"score": recovered, "alone": alone})
    found = [(row["recovery"], row["95 % interval"]) for row in headline_rows([made])]
    assert found[:3] == [("103.3 %", "94.5 to 110.1 %"), ("103.3 %", "–"), ("–", "0.01 to 0.015")]


def test_nothing_comes_from_elsewhere(subject: Maker) -> None:
    text, seen = page(subject, [record()])
    assert {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object", "base"} == set()
    assert [a for _, attributes in seen.tags for a in attributes if a in ("src", "href", "srcset", "onload", "onclick")] == []
    assert re.findall(r"https?:|url\(|@import", text) == []


def test_every_picture_can_be_heard(subject: Maker) -> None:
    _, seen = page(subject, [record()], pareto=[{"method": "x", "bits_per_channel": 2.0, "kl_bits": 0.1}])
    pictures = [attributes for tag, attributes in seen.tags if tag == "svg"]
    assert len(pictures) >= 5
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 30
    anchors = [attributes["id"] for tag, attributes in seen.tags if tag == "h2"]
    assert len(anchors) == len(set(anchors))
    assert [a["aria-labelledby"] for tag, a in seen.tags if tag == "section"] == anchors
    assert ("html", {"lang": "en"}) in seen.tags


def test_words_are_escaped(subject: Maker) -> None:
    bad = "<b>&\"'"
    text, seen = page(
        subject, [record(bad, failed_samples=[bad])], pareto=[{"method": bad, "bits_per_channel": 1.0, "kl_bits": 0.1}]
    )
    assert ("b", {}) not in seen.tags
    assert bad in seen.words


def test_what_is_wrong_is_said(subject: Maker) -> None:
    judged = record(
        gate={"passed": False, "failed": ["kl_bits is too high"]},
        calibration_overlap={"share": 0.3, "note": "30.0 % was calibrated on"},
        status="incomplete",
        failed_samples=["window 3: not finite"],
    )
    _, seen = page(subject, [judged], num_other_records=2)
    for phrase in (
        "incomplete, gate not met, 30.0 % calibrated on",
        "kl_bits is too high",
        "window 3: not finite",
        "2 results of other artifacts",
    ):
        assert phrase in seen.words


def test_a_run_without_results_has_a_page(subject: Maker) -> None:
    _, seen = page(subject, [])
    assert "Nothing was evaluated yet" in seen.words
    assert "Layers and heads" in seen.words


def test_a_longbench_record(subject: Maker) -> None:
    metrics = {
        "average": {"baseline": 40.0, "quantized": 39.0, "recovery": 0.975},
        "lcc": {"baseline": 40.0, "quantized": 39.0, "recovery": 0.975, "samples": 26, "category": "code"},
        "samples@0-4k": {"baseline": 1.0, "quantized": 1.0, "recovery": 1.0},
    }
    _, seen = page(subject, [record("longbench", headline=["average"], metrics=metrics)])
    assert "39.00" in seen.words and "97.5 %" in seen.words
    assert "LongBench, mode all" in seen.words


def test_speed_is_drawn_where_it_was_measured(subject: Maker) -> None:
    times = {"pqkv": {"p50": 4.0}, "DynamicCache": {"p50": 6.0}}
    rows = [{"context": n, "ms_per_token": times} for n in (1024, 4096)]
    _, seen = page(subject, [record()], bench={"tokens": rows, "environment": {"device": "cpu: x"}})
    assert "Speed against context" in seen.words and "DynamicCache" in seen.words and "one sequence, cpu: x" in seen.words
    assert "Speed against context" not in page(subject, [record()])[1].words


def test_memory_is_counted_as_the_cache_holds_it(subject: Maker) -> None:
    summary = summarize(subject().artifact)
    sinks, window, plain = summary.cache.num_sinks, summary.cache.window_tokens, summary.baseline_bytes_per_token
    assert compressed_bytes(summary, window + 63) == (window + 63) * plain
    assert compressed_bytes(summary, window + 64) == (sinks + window + 64) * plain + 64 * summary.code_bytes_per_token
    assert compressed_bytes(summary, window + 640) == (sinks + window + 64) * plain + 640 * summary.code_bytes_per_token


@pytest.mark.parametrize(
    ("low", "high", "axis", "expected"),
    [
        (0, 10, Axis("x"), [0, 2, 4, 6, 8, 10]),
        (3, 4, Axis("x"), [3, 3.2, 3.4, 3.6, 3.8, 4]),
        (0.01, 0.2, Axis("x", log=True), [0.01, 0.02, 0.05, 0.1, 0.2]),
        (1e-6, 1e-1, Axis("x", log=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (512, 4096, Axis("x", log=True, binary=True), [512, 1024, 2048, 4096]),
        (5, 5, Axis("x"), [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, axis: Axis, expected: list[float]) -> None:
    assert ticks(low, high, axis) == pytest.approx(expected)


def test_points_an_axis_cannot_show_are_left_out() -> None:
    chart = line_chart("t", "d", Axis("x"), Axis("y", log=True), {"a": [(1, 0.0), (2, 0.1), (3, float("nan"))], "b": [(1, 0)]})
    assert chart.count("<circle") == 1
    assert "b</li>" not in chart
    assert line_chart("t", "d", Axis("x"), Axis("y", log=True), {"b": [(1, 0)]}) == ""


def test_cells_without_a_number_are_empty() -> None:
    drawn = heat_map(
        "t", "d", ["r"], ["a", "b", "c"], [[0.5, None, 1.0]], ("row", "column"), top=1.0, write=lambda v: f"{v:.1f}"
    )
    assert (drawn.count('class="none"'), drawn.count('class="heat"')) == (1, 2)
    assert (drawn.count("on-light"), drawn.count("on-dark")) == (1, 1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000123456, "0.0001235"), (1234.56, "1,234.6"), (12, "12"), (None, "–"), ("all", "all"), (1.0, "1")],
)
def test_numbers(value: object, shown: str) -> None:
    assert number(value) == shown


def test_sizes_and_shares() -> None:
    assert [size(n) for n in (12, 2048, 1_030_000, 64.2 * 2**20, 3 * 2**40)] == [
        "12 B",
        "2 KiB",
        "1006 KiB",
        "64.2 MiB",
        "3 TiB",
    ]
    assert (percent(0.9954), percent(None)) == ("99.5 %", "–")


def colours(text: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", text))


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    light, dark = STYLE.split("prefers-color-scheme:dark", 1)
    found = colours(light) if scheme == "light" else colours(light) | colours(dark)
    for text in ("ink", "soft", "warn"):
        assert contrast(found[text], found["ground"]) >= 4.5, text
    assert contrast(found["ink"], found["card"]) >= 4.5
    assert contrast(found["on-heat"], found["heat"]) >= 4.5
    for index in range(8):
        assert contrast(found[f"c{index}"], found["ground"]) >= 3, index
