"""The report: everything in one file, numbers where they belong, words escaped, the same bytes every time."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from pqkv_cli.artifact.summary import summarize
from pqkv_cli.errors import UsageError
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.tasks import run_task
from pqkv_cli.report.page import ReportSource, report_page
from pqkv_cli.report.pictures import compressed_bytes
from pqkv_cli.report.rows import Table, headline_rows, number, percent, size

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
        self.pieces: list[tuple[str, str]] = []
        self.feed(text)

    def texts(self, tag: str) -> list[str]:
        return [piece for inside, piece in self.pieces if inside == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\u200b", "")
        self.pieces.append((self.open[-1] if self.open else "", data))


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
    assert [a for _, attributes in seen.tags for a in attributes if a in ("src", "srcset", "onload", "onclick")] == []
    # What pictures refer to are shapes of their own, and the cells of a heat map, which are in the page.
    links = [attributes["href"] or "" for _, attributes in seen.tags if "href" in attributes]
    assert [link for link in links if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert re.findall(r"https?:|url\((?!#)|@import", text) == []


def test_every_reference_meets_one_shape(subject: Maker) -> None:
    text, seen = page(subject, [record(), record("kld"), record("kld", "cache")])
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', text)) <= set(ids)


def test_the_same_results_give_the_same_bytes(subject: Maker) -> None:
    import matplotlib

    first, _ = page(subject, [record()])
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.facecolor": "red"}):
        assert page(subject, [record()])[0] == first
    assert not re.search(r"\b20\d\d-\d\d-\d\d", first), "no date"


def test_every_picture_can_be_heard(subject: Maker) -> None:
    _, seen = page(subject, [record()], pareto=[{"method": "x", "bits_per_channel": 2.0, "kl_bits": 0.1}])
    pictures = [attributes for tag, attributes in seen.tags if tag == "svg"]
    assert len(pictures) >= 5
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 10
    assert [tag for tag, _ in seen.tags].count("figcaption") == len(pictures)
    anchors = [attributes["id"] for tag, attributes in seen.tags if tag == "h2"]
    assert len(anchors) == len(set(anchors))
    assert [a["aria-labelledby"] for tag, a in seen.tags if tag == "section"] == anchors
    assert ("html", {"lang": "en"}) in seen.tags


def test_words_are_escaped(subject: Maker) -> None:
    bad = "_<script>&\"'$a_b$#0072b2"
    artifact = subject().artifact
    summary = replace(summarize(artifact), label=bad)
    points = [{"method": bad, "bits_per_channel": 1.0, "kl_bits": 0.1}]
    seen = Page(report_page(ReportSource(artifact.header, summary, [record(bad, failed_samples=[bad])], points)))
    assert seen.open == [] and "script" not in {tag for tag, _ in seen.tags}
    assert seen.words.count(bad) >= 6, "title, heading, warning, legends of two charts and a table"
    assert bad in seen.texts("text"), "in a legend, as it is"


def test_letters_that_no_picture_can_show_do_not_break_it(subject: Maker, capfd: pytest.CaptureFixture[str]) -> None:
    _, seen = page(subject, [record("\x1b\ud800漢" + 70 * "n")])
    assert any(text.startswith("??漢nn") and text.endswith("n…") and len(text) == 60 for text in seen.texts("text"))
    assert capfd.readouterr() == ("", "")


def test_numbers_stand_at_the_right(subject: Maker) -> None:
    assert Table("t", ("name", "value", "word"), [["1", "–", "2 b"], ["2", "1.5", "yes"]]).is_numeric == (False, True, False)
    text, _ = page(subject, [record()])
    assert '<td class="number">0.0123</td>' in text and "<td>complete</td>" in text


def test_lines_are_in_numbers_too(subject: Maker) -> None:
    text, seen = page(subject, [record(), record("kld", metrics=record()["metrics"] | {"by_context": []})])
    shown = re.search(r"<details>(.*?)</details>", text, re.DOTALL)
    assert shown is not None and "perplexity, mode all" in shown[1]
    assert re.findall(r'<th scope="row">(.*?)</th>\s*<td class="number">(.*?)</td>', shown[1]) == [
        ("128", "0.01"),
        ("256", "0.02"),
    ]


def test_without_matplotlib_the_install_line_is_said(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="matplotlib 3.8 or newer: pip install 'matplotlib>=3.8'"):
        page(subject, [])


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
