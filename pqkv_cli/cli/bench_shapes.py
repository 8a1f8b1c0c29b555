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
    picture: Path | None,
    output: "Output",
    reporter: "TerminalReporter",
) -> None:
    """Measure the shapes `names`, show tables, and write the picture where it is asked for."""
    from pqkv_cli.evaluation.shape_picture import shape_picture
    from pqkv_cli.evaluation.shapes import SHAPES
    from pqkv_cli.files import write_text
    from pqkv_cli.pipeline.bench_shapes import bench_shapes

    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise UsageError(f"--shape is {', '.join(map(repr, unknown))}; expected one of {', '.join(SHAPES)}")
    found = bench_shapes(names, contexts, batches, repeats, backend, reporter, device)  # type: ignore[arg-type]
    document = found.document()
    notes: list[RenderableType] = [f"not measured: {why}" for why in found.skipped]
    if picture is not None:
        write_text(picture, shape_picture(document))
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
    encoding = [
        [*(row["shape"], row["format"], f"{row['tokens']:,}", f"{row['encode_ms']:.1f}", f"{row['share']:.1%}")]
        for row in document["encoding"]
    ]
    if encoding:
        shown.append(table("encoding beside prefill", ("shape", "format", "tokens", "ms", "of prefill"), encoding))
    return shown


def _ms(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['p50']:.1f}"
