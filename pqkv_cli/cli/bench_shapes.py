"""What ``pqkv bench --shape`` shows and writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pqkv_cli.cli.output import Output, TerminalReporter


def show_shapes(
    names: list[str],
    contexts: list[int],
    batches: list[int],
    repeats: int,
    backend: str,
    device: str | None,
    memory: str | None,
    picture: Path | None,
    output: "Output",
    reporter: "TerminalReporter",
) -> None:
    """Measure the shapes `names`, show tables, and write the picture where it is asked for."""
    from pqkv_cli.benchmarks.bench_shapes import ShapeSettings, bench_shapes
    from pqkv_cli.benchmarks.shapes import SHAPES
    from pqkv_cli.files import write_text
    from pqkv_cli.pipeline.capacity import parse_device_bytes
    from pqkv_cli.report.canvas import require_matplotlib
    from pqkv_cli.report.page import shape_page

    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise UsageError(f"--shape is {', '.join(map(repr, unknown))}; expected one of {', '.join(SHAPES)}")
    if picture is not None:
        require_matplotlib()  # not first when everything is measured
    held = None if memory is None else parse_device_bytes(memory, "--memory")
    lists = tuple(names), tuple(contexts), tuple(batches)
    settings = ShapeSettings(*lists, repeats, backend, device, held)  # type: ignore[arg-type]
    found = bench_shapes(settings, reporter)
    document = found.document()
    missing = {name: why for row in found.tokens for name, why in row["missing"].items()}
    notes: list[RenderableType] = [f"not measured: {name} ({why})" for name, why in missing.items()]
    notes += [f"not measured: {why}" for why in found.skipped]
    if picture is not None:
        write_text(picture, shape_page(document))
        notes.append(f"picture: {picture}")
    output.result(document, *_tables(document), *notes)


def _tables(document: dict[str, Any]) -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    attention = [
        [
            *(row["shape"], row["format"], row["batch"], f"{row['context']:,}", f"{row['codes_ms']['p50']:.3f}"),
            *(f"{row['static_ms']['p50']:.3f}", f"{row['ratio_to_static']:.2f}", f"{row['share_of_copy_bandwidth']:.0%}"),
        ]
        for row in document["attention"]
    ]
    columns = ("shape", "format", "batch", "context", "codes ms", "static ms", "times faster", "of copy bandwidth")
    shown: list[RenderableType] = [table(f"attention of one layer, backend {document['backend']}", columns, attention)]
    if document["tokens"]:
        names = list(dict.fromkeys(name for row in document["tokens"] for name in row["ms_per_token"]))
        rows = [
            [row["shape"], row["format"], f"{row['context']:,}", *(_ms(row["ms_per_token"].get(name)) for name in names)]
            for row in document["tokens"]
        ]
        shown.append(table("whole decode steps, ms", ("shape", "format", "context", *names), rows))
    return [*shown, *_model_tables(document)]


def _model_tables(document: dict[str, Any]) -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    shown: list[RenderableType] = []
    if document["encoding"]:
        titles = ("shape", "format", "tokens", "dense ms", "codes ms", "overhead", "encoding alone, of prefill")
        rows = [
            [
                *(row["shape"], row["format"], f"{row['tokens']:,}", _ms(row["prefill_ms"]), _ms(row["codes_prefill_ms"])),
                *(f"{row['overhead']:+.1%}", f"{row['share']:.1%}"),
            ]
            for row in document["encoding"]
        ]
        shown.append(table("time until the first token", titles, rows))
    if document["equal_memory"]:
        columns = ("shape", "format", "context", "GB", "rows, static", "tokens/s", "rows, codes", "tokens/s", "times as many")
        rows = [
            [
                *(row["shape"], row["format"], f"{row['context']:,}", f"{row['budget_bytes'] / 1e9:.3g}"),
                *(cell for side in ("static", "codes") for cell in (row[side]["batch"], f"{row[side]['tokens_per_s']:,.0f}")),
                f"{row['ratio']:.2f}",
            ]
            for row in document["equal_memory"]
        ]
        shown.append(table("the largest batch that fits into equal memory", columns, rows))
    return shown


def _ms(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['p50']:.1f}"
