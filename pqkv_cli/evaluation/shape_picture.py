"""The picture of `pqkv bench --shape`: milliseconds per token and gigabytes of cache against context. Measures nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pqkv_cli.benchmarks.decode_speed import OURS
from pqkv_cli.evaluation.report_style import STYLE
from pqkv_cli.evaluation.report_svg import Axis, line_chart

Lines = dict[str, list[tuple[float, float]]]


def shape_picture(document: Mapping[str, Any]) -> str:
    """Return one HTML page with both charts for every shape whose whole steps were timed, else those of attention alone."""
    where = document["environment"]["device"]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in (*document["tokens"], *document["attention"])):
        rows = [row for row in document["tokens"] if row["shape"] == shape]
        times, held = _step_lines(rows) if rows else _attention_lines(document["attention"], shape)
        what = "one decode step" if rows else "attention of one layer for one token"
        context = Axis("tokens in the cache", log=True, binary=True, tick=_tokens)
        charts = (
            line_chart(f"{shape}: speed", f"Median milliseconds of {what} on {where}.", context, Axis("ms"), times),
            line_chart(f"{shape}: memory", "Bytes of the cache.", context, Axis("GB", log=True), held),
        )
        parts.append(f"<h2>{escape(shape)}</h2>" + "".join(charts))
    title = "Decode speed and memory against context"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}<main><h1>{title}</h1>{''.join(parts)}</main></html>\n"


def _step_lines(rows: Sequence[Mapping[str, Any]]) -> tuple[Lines, Lines]:
    times: Lines = {}
    held: Lines = {}
    for row in rows:
        for name, found in row["ms_per_token"].items():
            times.setdefault(_line(name, row["format"]), []).append((float(row["context"]), float(found["p50"])))
        for name, count in row["cache_bytes"].items():
            held.setdefault(_line(name, row["format"]), []).append((float(row["context"]), count / 1e9))
    return _once(times), _once(held)


def _attention_lines(rows: Sequence[Mapping[str, Any]], shape: str) -> tuple[Lines, Lines]:
    times: Lines = {}
    held: Lines = {}
    for row in rows:
        if row["shape"] != shape or row["batch"] != min(r["batch"] for r in rows if r["shape"] == shape):
            continue
        for name, ms, count in ((OURS, "codes_ms", "code_bytes"), ("static cache", "static_ms", "dense_bytes")):
            line, context = _line(name, row["format"]), float(row["context"])
            times.setdefault(line, []).append((context, float(row[ms]["p50"])))
            held.setdefault(line, []).append((context, row[count] / 1e9))
    return _once(times), _once(held)


def _line(name: str, label: str) -> str:
    return f"{name}, {label}" if name == OURS else name


def _once(lines: Lines) -> Lines:
    """Return the lines with one point per context: a cache that was timed beside several formats shows its fastest."""
    return {name: sorted({x: min(y for a, y in points if a == x) for x, _ in points}.items()) for name, points in lines.items()}


def _tokens(count: float) -> str:
    return f"{count / 1024:.0f}K" if count >= 1024 else f"{count:.0f}"
