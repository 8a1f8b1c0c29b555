"""A run's results as one HTML page that needs nothing else: no network, no scripts, no other files.

Knows what a page is filled with; tables and pictures are made elsewhere, and the templates hold order and prose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.summary import Summary
from pqkv_cli.evaluation.channels import ChannelPeaks
from pqkv_cli.report import pictures, rows
from pqkv_cli.report.charts import colours_css
from pqkv_cli.report.rows import Record, number, percent


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
    """Return the report of a run.

    Raises
    ------
    UsageError
        If matplotlib cannot be imported.
    """
    return _filled(
        "report.html",
        summary=source.summary,
        tiles=_tiles(source),
        headline=rows.headline_table(source.records),
        faults=rows.faults(source.records),
        num_other_records=source.num_other_records,
        comparison=rows.pareto_table(source.pareto),
        longbench=[rows.longbench_table(record) for record in source.records if record["task"] == "longbench"],
        held=rows.memory_table(source.records),
        costs=rows.cost_table(source.records),
        settings=rows.settings_table(source.records),
        pareto=pictures.pareto(source.pareto),
        divergence=pictures.divergence(source.records),
        recall=[picture for record in source.records for picture in pictures.recall_grids(record)],
        errors=pictures.layer_errors(source.header),
        channels=pictures.outlier_channels(source.channels),
        memory=pictures.memory(source.summary),
        speed=pictures.speed(source.bench),
    )


def shape_page(document: Mapping[str, Any]) -> str:
    """Return what ``pqkv bench --shape`` measured, as speed and memory against context of every shape.

    Raises
    ------
    UsageError
        If matplotlib cannot be imported.
    """
    shapes = dict.fromkeys(row["shape"] for row in (*document["tokens"], *document["attention"]))
    return _filled("shapes.html", shapes={shape: pictures.shape_pictures(document, shape) for shape in shapes})


def _filled(template: str, **content: Any) -> str:
    templates = Environment(
        loader=PackageLoader("pqkv_cli.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return templates.get_template(template).render(colours=colours_css(), **content)


def _tiles(source: ReportSource) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: what each is, its value and a remark."""
    summary = source.summary
    ratio = summary.baseline_bytes_per_token / (summary.code_bytes_per_token + summary.dense_bytes_per_token)
    tiles = [
        ("bits per channel", number(summary.total_bits), f"keys {summary.keys_bits:.3g}, values {summary.values_bits:.3g}"),
        ("smaller, long contexts", f"{ratio:.1f} ×", "than bf16, codes alone"),
    ]
    strict = [record for record in source.records if "kl_bits" in record["metrics"]]
    for record in sorted(strict, key=lambda r: (r["mode"], r["task"] != "perplexity"))[:1]:
        loss, same = (record["metrics"][name]["quantized"] for name in ("kl_bits", "top1_agreement"))
        where = f"{record['task']}, mode {record['mode']}"
        tiles += [("KL, bits per token", f"{loss:.4f}", where), ("same top token", percent(same), where)]
    return tiles
