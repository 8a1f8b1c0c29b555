"""``pqkv bench``: how fast attention over codes and whole decode steps are on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqkv_cli.cli.option_set import Changes, takes
from pqkv_cli.cli.options import (
    DebugOption,
    ForceOption,
    JsonOption,
    ModelOption,
    RunOption,
    TargetArgument,
)
from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pqkv_cli.benchmarks.run import BenchReport
    from pqkv_cli.benchmarks.step_speed import TokenTimes
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.pipeline.target import Target
    from pqkv_kernels.bench import AttentionTimes, Quantiles


KmeansOption = Annotated[
    bool, typer.Option("--kmeans", help="Compare our k-means with that of faiss on a run's calibration instead.")
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME", help="Instead of a run: llama-2-7b, llama-3-8b or small; may be repeated."),
]
PictureOption = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.html", help="With --shape: draw time and memory against context.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="With --shape: what caches may take where the largest batches are compared."),
]
ContextOption = Annotated[list[int] | None, typer.Option("--context", help="Cached tokens; may be repeated.")]
BatchOption = Annotated[list[int] | None, typer.Option("--batch", help="Rows, for attention alone; may be repeated.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", help="Timed repetitions.")]
BackendOption = Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, torch, native or triton.")]
_BACKENDS = ("auto", "torch", "native", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchWords:
    """The options of ``pqkv bench``."""

    target: TargetArgument = None
    run: RunOption = None
    context: ContextOption = None
    batch: BatchOption = None
    repeats: RepeatsOption = 20
    backend: BackendOption = "auto"
    kmeans: KmeansOption = False
    shape: ShapeOption = None
    picture: PictureOption = None
    memory: MemoryOption = None
    model: ModelOption = None
    force: ForceOption = False
    changes: Changes
    json_target: JsonOption = None
    debug: DebugOption = False


@takes(BenchWords)
def bench(words: BenchWords) -> None:
    """Measure decode speed beside uncompressed caches, in one process.

    Nothing is timed before its answers have been compared with the reference on the same device.

    With --shape no run is needed: weights and codebooks are random, and what does not fit into memory is listed.

    Example: pqkv bench my-run --context 16384
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.words import checked, target_of

    output, reporter = Output(words.json_target), TerminalReporter()
    _check(words)
    if words.shape:
        return _show_shapes(words, words.shape, checked(words.changes)["device"], output, reporter)
    if words.kmeans:
        return _show_kmeans(target_of(words.target, words.run, reporter), output, reporter)

    from pqkv_cli.benchmarks.run import BenchSettings
    from pqkv_cli.benchmarks.run import bench as measure
    from pqkv_cli.pipeline.start import artifact_source

    source = artifact_source(target_of(words.target, words.run, reporter), words.model, checked(words.changes))
    lists = tuple(words.context or ()), tuple(words.batch or ())
    settings = BenchSettings(*lists, words.repeats, words.backend)  # type: ignore[arg-type]
    report = measure(source, settings, reporter, force=words.force)
    output.result(report.document(), *_tables(report))


def _check(words: BenchWords) -> None:
    lists = (("context", words.context), ("batch", words.batch))
    faults = [f"--{name} is {n}; expected at least 1" for name, ns in lists for n in ns or () if n < 1]
    if words.repeats < 1:
        faults.append(f"--repeats is {words.repeats}; expected at least 1")
    if words.backend not in _BACKENDS:
        faults.append(f"--backend is {words.backend!r}; expected one of {', '.join(_BACKENDS)}")
    if not words.shape and (words.picture or words.memory) is not None:
        faults.append("--picture and --memory belong to --shape; expected --shape beside them")
    if faults:
        raise UsageError("; ".join(faults))


def _show_kmeans(target: "Target", output: "Output", reporter: "TerminalReporter") -> None:
    from pqkv_cli.benchmarks.kmeans import bench_kmeans
    from pqkv_cli.cli.output import table
    from pqkv_cli.pipeline.start import continue_run

    found, recipe = continue_run(target, {})
    report = bench_kmeans(found, recipe.codebooks.iterations, recipe.seed, reporter)
    columns = ("points", "channels", "pqkv s", "faiss s", "times faster", "distortion, pqkv / faiss", "worst subspace")
    rows: list[list[object]] = []
    for row in report["rows"]:
        seconds = row["seconds"], row["faiss_seconds"]
        ratios = f"{row['distortion_ratio']:.4f}", f"{row['worst_ratio']:.4f}"
        shown = f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{seconds[1] / seconds[0]:.2f}"
        rows.append([row["points"], row["subspace_dim"], *shown, *ratios])
    title = f"k-means, {report['num_centroids']} centroids, {report['iterations']} iterations, faiss {report['faiss']}"
    output.result(report, table(title, columns, rows))


def _tables(report: "BenchReport") -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    columns = ("batch", "context", "codes ms (p50)", "p20 to p80", "static cache ms (p50)", "times faster", "of copy bandwidth")
    title = f"decode attention of one layer, backend {report.backend} ({report.reason})"
    shown: list[RenderableType] = [table(title, columns, [_attention_row(t) for t in report.attention])]
    names = list(report.tokens[0].ms_per_token)
    token_columns = ("context", *(f"{name} ms/token" for name in names), *(f"times faster than {name}" for name in names[1:]))
    shown.append(table("whole decode steps", token_columns, [_token_row(t, names) for t in report.tokens]))
    return [*shown, *(f"not measured: {name} ({why})" for name, why in report.tokens[0].missing.items())]


def _attention_row(times: "AttentionTimes") -> list[object]:
    codes, static = times.codes_ms, times.static_ms
    spread = f"{codes.p20:.3f} to {codes.p80:.3f}"
    ratios = f"{times.ratio:.2f}", f"{times.bandwidth_share:.0%}"
    return [times.batch, f"{times.context:,}", f"{codes.p50:.3f}", spread, f"{static.p50:.3f}", *ratios]


def _token_row(times: "TokenTimes", names: list[str]) -> list[object]:
    ratios = [times.ratio(name) for name in names[1:]]
    return [f"{times.context:,}", *(_ms(times.ms_per_token[name]) for name in names), *(f"{ratio:.2f}" for ratio in ratios)]


def _ms(found: "Quantiles") -> str:
    return f"{found.p50:.1f} ({found.p20:.1f} to {found.p80:.1f})"


def _show_shapes(
    words: BenchWords, names: list[str], device: str | None, output: "Output", reporter: "TerminalReporter"
) -> None:
    """Measure the shapes `names`, show tables, and write the picture where it is asked for."""
    from pqkv_cli.benchmarks.bench_shapes import ShapeSettings, bench_shapes
    from pqkv_cli.benchmarks.shapes import SHAPES
    from pqkv_cli.files import write_text
    from pqkv_cli.pipeline.capacity import parse_device_bytes
    from pqkv_cli.report.charts import require_matplotlib
    from pqkv_cli.report.page import shape_page

    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise UsageError(f"--shape is {', '.join(map(repr, unknown))}; expected one of {', '.join(SHAPES)}")
    if words.picture is not None:
        require_matplotlib()  # not first when everything is measured
    held = None if words.memory is None else parse_device_bytes(words.memory, "--memory")
    lists = tuple(names), tuple(words.context or ()), tuple(words.batch or ())
    settings = ShapeSettings(*lists, words.repeats, words.backend, device, held)  # type: ignore[arg-type]
    found = bench_shapes(settings, reporter)
    document = found.document()
    missing = {name: why for row in found.tokens for name, why in row["missing"].items()}
    notes: list[RenderableType] = [f"not measured: {name} ({why})" for name, why in missing.items()]
    notes += [f"not measured: {why}" for why in found.skipped]
    if words.picture is not None:
        write_text(words.picture, shape_page(document))
        notes.append(f"picture: {words.picture}")
    output.result(document, *_shape_tables(document), *notes)


def _shape_tables(document: dict[str, Any]) -> "list[RenderableType]":
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
            [row["shape"], row["format"], f"{row['context']:,}", *(_p50(row["ms_per_token"].get(name)) for name in names)]
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
                *(row["shape"], row["format"], f"{row['tokens']:,}", _p50(row["prefill_ms"]), _p50(row["codes_prefill_ms"])),
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


def _p50(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['p50']:.1f}"
