"""Numbers of result records as people read them, and tables of them as HTML. Knows the keys of a record, no pictures."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Record = Mapping[str, Any]
_PARTS = ("baseline", "quantized")
_HEADLINE = ("result", "mode", "uncompressed", "compressed", "recovery", "95 % interval", "bits/channel", "state")


def number(value: object) -> str:
    """Return `value` with as many digits as say something, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def size(num_bytes: float) -> str:
    """Return bytes in the largest unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} TiB"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the first column names its rows. Cells are texts."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_breakable(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """Return `name` as HTML that a narrow column may break behind an underscore or an at sign."""
    return re.sub(r"([_@])", r"\1<wbr>", escape(name))


def headline_table(records: Sequence[Record]) -> str:
    """Return one row per headline metric of every record."""
    return table("Compressed next to uncompressed", _HEADLINE, [list(row.values()) for row in headline_rows(records)])


def headline_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the cells of the headline table, by column, for a report or a model card."""
    rows = []
    for record in records:
        total = number(record["bits_per_channel"]["total"])
        for name, metric in headline_metrics(record):
            shown = [number(metric.get(part)) for part in _PARTS]
            cells = [f"{record['task']}: {name}", record["mode"], *shown, *_recovery(metric), total, state(record)]
            rows.append(dict(zip(_HEADLINE, cells, strict=True)))
    return rows


def _recovery(metric: Mapping[str, Any]) -> tuple[str, str]:
    """Return the recovery and the 95 % interval, which is that of the value where nothing is compared."""
    recovery, interval = metric.get("recovery"), metric.get("ci95")
    if interval is None:
        return percent(recovery), "–"
    low, high = interval
    if recovery is None:
        return "–", f"{number(low)} to {number(high)}"
    return percent(recovery), f"{100 * low:.1f} to {percent(high)}"


def headline_metrics(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the metrics that stand for the task, or all that are numbers where none do."""
    metrics = {name: m for name, m in record["metrics"].items() if isinstance(m, Mapping) and "quantized" in m}
    chosen = [name for name in record.get("headline", ()) if name in metrics]
    if chosen and "top1_agreement" in metrics:
        chosen.append("top1_agreement")
    yield from ((name, metrics[name]) for name in chosen or metrics)


def state(record: Record) -> str:
    """Return what a reader must know before believing a record: complete or not, gate, overlap with calibration."""
    words = [str(record.get("status", "complete"))]
    if "gate" in record:
        words.append("gate passed" if record["gate"]["passed"] else "gate not met")
    overlap = (record.get("calibration_overlap") or {}).get("share")
    if overlap is not None and overlap > 0.01:
        words.append(f"{percent(overlap)} calibrated on")
    return ", ".join(words)


def cost_table(records: Sequence[Record]) -> str:
    """Return what generation cost on both sides, empty where no record says."""
    rows = []
    for record in records:
        cost = record.get("cost", {})
        if not isinstance(cost.get("ms_per_token"), Mapping):
            continue
        for side, label in (("baseline", "uncompressed"), ("quantized", "compressed")):
            steps, first = cost["ms_per_token"][side], cost["prefill_ms"][side]
            peak = cost["peak_bytes"][side]
            joules = cost.get("energy", {}).get(side, {}).get("joules_per_token")
            cells = [number(first["p50"]), number(steps["p20"]), number(steps["p50"]), number(steps["p90"]), number(joules)]
            rows.append([f"{record['task']}, {label}", record["mode"], *cells, "–" if peak is None else size(peak)])
    columns = ("task", "mode", "first token, ms", "next, p20 ms", "next, p50 ms", "next, p90 ms", "J per token", "peak memory")
    return table("Time and memory while answering, per batch", columns, rows) if rows else ""


def longbench_table(record: Record) -> str:
    """Return LongBench's scores by task, as its own tables give them."""
    rows = []
    for name, metric in record["metrics"].items():
        if "@" in name or not isinstance(metric, Mapping):
            continue
        shown = [f"{metric[side]:.2f}" if metric[side] is not None else "–" for side in _PARTS]
        samples = number(metric.get("samples"))
        rows.append([name, *shown, *_recovery(metric), samples, str(metric.get("category", ""))])
    columns = ("task", "uncompressed", "compressed", "recovery", "95 % interval", "samples", "kind")
    return table(f"LongBench, mode {record['mode']}", columns, rows)
