"""Numbers of result records as people read them, in tables of plain text. Knows the keys of a record; no page, no pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
# Both sides of a record: its key, and how people call it.
SIDES_OF_RECORDS = {"baseline": "uncompressed", "quantized": "compressed"}
_HEADLINE = ("result", "mode", "uncompressed", "compressed", "recovery", "95 % interval", "bits/channel", "state")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; the first column names its rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def is_numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers (or dashes) alone, which stand at the right."""
        return (
            False,
            *(all(cell[:1] in "0123456789-+–" for cell in column) for column in list(zip(*self.rows, strict=True))[1:]),
        )


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


def tokens(count: float) -> str:
    """Return a number of tokens, in K (1,024) where it is large."""
    return f"{count / 1024:.0f}K" if count >= 1024 else f"{count:.0f}"


def headline_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the cells of the headline table, by column, for a report or a model card."""
    rows = []
    for record in records:
        total = number(record["bits_per_channel"]["total"])
        for name, metric in headline_metrics(record):
            values = [number(metric.get(side)) for side in SIDES_OF_RECORDS]
            cells = [f"{record['task']}: {name}", record["mode"], *values, *_recovery(metric), total, state(record)]
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


def faults(records: Sequence[Record]) -> list[str]:
    """Return what was wrong with `records`: gates not met, samples that failed, text that was calibrated on; each once."""
    notes = [fault for record in records for fault in record.get("gate", {}).get("failed", ())]
    for record in records:
        overlap = (record.get("calibration_overlap") or {}).get("note")
        own = [*record.get("failed_samples", ()), *([overlap] if overlap else [])]
        notes += [f"{record['task']} ({record['mode']}): {fault}" for fault in own]
    return list(dict.fromkeys(notes))


def headline_table(records: Sequence[Record]) -> Table:
    """Return one row per headline metric of every record."""
    rows = [list(row.values()) for row in headline_rows(records)]
    return Table("Compressed beside uncompressed", _HEADLINE, rows)


def cost_table(records: Sequence[Record]) -> Table:
    """Return what generation cost on both sides; without rows where no record says."""
    rows = []
    for record in records:
        cost = record.get("cost", {})
        if not isinstance(cost.get("ms_per_token"), Mapping):
            continue
        for side, label in SIDES_OF_RECORDS.items():
            steps, peak = cost["ms_per_token"][side], cost["peak_bytes"][side]
            joules = cost.get("energy", {}).get(side, {}).get("joules_per_token")
            times = (cost["prefill_ms"][side]["p50"], steps["p20"], steps["p50"], steps["p90"], joules)
            cells = [record["mode"], *map(number, times), "–" if peak is None else size(peak)]
            rows.append([f"{record['task']}, {label}", *cells])
    columns = ("task", "mode", "first token, ms", "next, p20 ms", "next, p50 ms", "next, p90 ms", "J per token", "peak memory")
    return Table("Time and memory while answering, per batch", columns, rows)


def longbench_table(record: Record) -> Table:
    """Return LongBench's scores by task, as its own tables give them."""
    rows = []
    for name, metric in record["metrics"].items():
        if "@" not in name and isinstance(metric, Mapping):
            scores = [f"{metric[side]:.2f}" if metric[side] is not None else "–" for side in SIDES_OF_RECORDS]
            samples = number(metric.get("samples"))
            rows.append([name, *scores, *_recovery(metric), samples, str(metric.get("category", ""))])
    columns = ("task", "uncompressed", "compressed", "recovery", "95 % interval", "samples", "kind")
    return Table(f"LongBench, mode {record['mode']}", columns, rows)


def memory_table(records: Sequence[Record]) -> Table:
    """Return the bytes of the fullest cache that each record measured; without rows where none did."""
    rows = []
    for record in records:
        held = record["cache_bytes"]
        if held.get("num_tokens") and held["quantized"]:
            ratio = f"{held['baseline'] / held['quantized']:.2f} ×"
            cells = [size(held["baseline"]), size(held["quantized"]), ratio, number(record["bits_per_channel"]["total"])]
            rows.append([f"{record['task']}, {held['num_tokens']:,} tokens", *cells])
    columns = ("fullest cache measured", "uncompressed", "compressed", "smaller", "bits/channel")
    return Table("Bytes that were really held", columns, rows)


def settings_table(records: Sequence[Record]) -> Table:
    """Return how and where each record was measured."""
    rows = []
    for record in records:
        wanted, where = record["settings"], record["environment"]
        used = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None and key != "mode")
        notes = ", ".join(f"{key} {value}" for key, value in record.get("notes", {}).items())
        place = f"{where['device']}, torch {where['torch']}, transformers {where['transformers']}"
        rows.append([f"{record['task']}, mode {record['mode']}", used, notes or "–", place])
    return Table("Settings and environment", ("result", "settings", "notes", "environment"), rows)


def pareto_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Return the numbers of a comparison with other methods, in order of bits."""
    rows = []
    for point in sorted(points, key=lambda p: float(p["bits_per_channel"])):
        losses = [number(point.get(key)) for key in ("kl_bits", "kl_bits_p99")]
        others = [percent(point.get("top1_agreement")), number(point.get("perplexity"))]
        front = {True: "yes", False: "no"}.get(point.get("on_front"), "–")  # type: ignore[arg-type]
        rows.append([str(point["method"]), number(point["bits_per_channel"]), *losses, *others, front])
    columns = ("method", "bits/channel", "KL, mean", "KL, p99", "same top token", "perplexity", "unbeaten")
    return Table("The same text, every key and value quantized", columns, rows)
