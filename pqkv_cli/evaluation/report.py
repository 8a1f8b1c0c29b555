"""A run's results as one HTML page that needs nothing else: no network, no scripts, no other files.

Knows the order of a report and its style; tables and pictures are made elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.summary import Summary
from pqkv_cli.evaluation.channels import ChannelPeaks
from pqkv_cli.evaluation.report_channels import channel_pictures
from pqkv_cli.evaluation.report_pictures import divergence, layer_errors, memory, pareto, recall_grids, speed
from pqkv_cli.evaluation.report_style import STYLE
from pqkv_cli.evaluation.report_tables import cost_table, headline_table, longbench_table, number, percent, size, table

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReportSource:
    """What a report is made of.

    Attributes
    ----------
    records
        Results of just this artifact.
    pareto
        Points of a comparison with rivals (``pqkv.pareto/1``); empty where there was none.
    num_other_records
        Results that were left out because they are of another artifact.
    channels
        How large the channels of keys and values get; empty where the calibration is not at hand.
    bench
        What `pqkv bench` measured (``pqkv.bench/1``); empty where it did not.
    """

    header: Header
    summary: Summary
    records: Sequence[Record]
    pareto: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    num_other_records: int = 0
    channels: Sequence[ChannelPeaks] = field(default_factory=tuple)
    bench: Mapping[str, Any] = field(default_factory=dict)


def report_page(source: ReportSource) -> str:
    """Return the whole page."""
    title = f"{source.summary.label}: compressed key/value cache"
    sections = "".join(_section(name, body) for name, body in _sections(source) if body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{_tiles(source)}</header><main>{sections}</main>"
        f"<footer>{_footer(source)}</footer></body></html>\n"
    )


def _sections(source: ReportSource) -> list[tuple[str, str]]:
    records = source.records
    quality = headline_table(records) if records else "<p>Nothing was evaluated yet: <code>pqkv eval</code>.</p>"
    longbench = "".join(longbench_table(record) for record in records if record["task"] == "longbench")
    return [
        ("How good", quality + _warnings(source)),
        ("Against other methods", pareto(source.pareto)),
        ("Where it is lost", divergence(records)),
        ("What it still finds", "".join(map(recall_grids, records))),
        ("LongBench", longbench),
        ("Layers and heads", layer_errors(source.header)),
        ("Outlier channels", channel_pictures(source.channels)),
        ("How small", memory(source.summary) + _measured_memory(records)),
        ("How fast", speed(source.bench) + cost_table(records)),
        ("How it was measured", _settings(records)),
    ]


def _section(name: str, body: str) -> str:
    anchor = name.lower().replace(" ", "-")
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(name)}</h2>{body}</section>'


def _tiles(source: ReportSource) -> str:
    summary = source.summary
    per_token = summary.code_bytes_per_token + summary.dense_bytes_per_token
    tiles = [
        ("bits per channel", number(summary.total_bits), f"keys {summary.keys_bits:.3g}, values {summary.values_bits:.3g}"),
        ("smaller, long contexts", f"{summary.baseline_bytes_per_token / per_token:.1f} ×", "than bf16, codes alone"),
    ]
    strict = [r for r in source.records if "kl_bits" in r["metrics"]]
    for record in sorted(strict, key=lambda r: (r["mode"], r["task"] != "perplexity"))[:1]:
        kl_bits, top1 = record["metrics"]["kl_bits"]["quantized"], record["metrics"]["top1_agreement"]["quantized"]
        tiles.append(("KL, bits per token", f"{kl_bits:.4f}", f"{record['task']}, mode {record['mode']}"))
        tiles.append(("same top token", percent(top1), f"{record['task']}, mode {record['mode']}"))
    return (
        '<ul class="tiles">'
        + "".join(
            f'<li><span class="what">{escape(what)}</span><strong>{escape(value)}</strong><span>{escape(note)}</span></li>'
            for what, value, note in tiles
        )
        + "</ul>"
    )


def _warnings(source: ReportSource) -> str:
    notes = [f for record in source.records for f in record.get("gate", {}).get("failed", ())]
    notes += [f"{r['task']} ({r['mode']}): {f}" for r in source.records for f in record_faults(r)]
    if source.num_other_records:
        notes.append(f"{source.num_other_records} results of other artifacts in the same place are not shown.")
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return f'<ul class="warnings">{items}</ul>' if items else ""


def record_faults(record: Record) -> list[str]:
    """Return why a record is not to be believed without a second look."""
    overlap = record.get("calibration_overlap") or {}
    return [*record.get("failed_samples", ()), *([overlap["note"]] if overlap.get("note") else [])]


def _measured_memory(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        held = record["cache_bytes"]
        if held.get("num_tokens") and held["quantized"]:
            ratio = f"{held['baseline'] / held['quantized']:.2f} ×"
            cells = [size(held["baseline"]), size(held["quantized"]), ratio, number(record["bits_per_channel"]["total"])]
            rows.append([f"{record['task']}, {held['num_tokens']:,} tokens", *cells])
    columns = ("fullest cache measured", "uncompressed", "compressed", "smaller", "bits/channel")
    return table("Bytes of tensors that were really held", columns, rows) if rows else ""


def _settings(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        wanted, where = record["settings"], record["environment"]
        used = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None and key != "mode")
        notes = ", ".join(f"{key} {value}" for key, value in record.get("notes", {}).items())
        place = f"{where['device']}, torch {where['torch']}, transformers {where['transformers']}"
        rows.append([f"{record['task']}, mode {record['mode']}", used, notes or "–", place])
    return table("Settings and environment", ("result", "settings", "notes", "environment"), rows) if rows else ""


def _footer(source: ReportSource) -> str:
    return (
        f"<p>Artifact <code>{escape(source.summary.sha256)}</code>, written by pqkv {escape(source.summary.pqkv_version)}. "
        "Mode <em>all</em>: every key and value of every token is quantized; mode <em>cache</em>: as in use, the first and the "
        "most recent tokens exact. KL is the divergence of next-token distributions from the uncompressed model; recovery is "
        "compressed over uncompressed, the other way round for losses, so 100 % is perfect.</p>"
    )
