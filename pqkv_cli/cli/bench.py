"""``pqkv bench``: how fast attention over codes and whole decode steps are on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.options import (
    DebugOption,
    ForceOption,
    JsonOption,
    ModelOption,
    RunOption,
    TargetArgument,
)
from pqkv_cli.cli.recipe_options import Changes
from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pqkv_cli.benchmarks.decode_speed import TokenTimes
    from pqkv_cli.benchmarks.run import BenchReport
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
_BACKENDS = ("auto", "torch", "native", "triton")


def bench(
    target: TargetArgument = None,
    run: RunOption = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Cached tokens; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Rows, for attention alone; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed repetitions.")] = 20,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, torch, native or triton.")] = "auto",
    kmeans: KmeansOption = False,
    shape: ShapeOption = None,
    picture: PictureOption = None,
    memory: MemoryOption = None,
    model: ModelOption = None,
    force: ForceOption = False,
    *,
    changes: Changes,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure decode speed beside uncompressed caches, in one process.

    Nothing is timed before its answers have been compared with the reference on the same device.

    With --shape no run is needed: weights and codebooks are random, and what does not fit into memory is listed.

    Example: pqkv bench my-run --context 16384
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.words import checked, target_of

    output, reporter = Output(json_target), TerminalReporter()
    _check(context or [], batch or [], repeats, backend, bool(shape) or (picture or memory) is None)
    if shape:
        from pqkv_cli.cli.bench_shapes import show_shapes

        device = checked(changes)["device"]
        lists = shape, context or [], batch or []
        return show_shapes(*lists, repeats, backend, device, memory, picture, output, reporter)
    if kmeans:
        return _show_kmeans(target_of(target, run, reporter), output, reporter)

    from pqkv_cli.benchmarks.run import BenchSettings
    from pqkv_cli.benchmarks.run import bench as measure
    from pqkv_cli.pipeline.start import artifact_source

    source = artifact_source(target_of(target, run, reporter), model, checked(changes))
    wanted = BenchSettings(tuple(context or ()), tuple(batch or ()), repeats, backend)  # type: ignore[arg-type]
    report = measure(source, wanted, reporter, force=force)
    output.result(report.document(), *_tables(report))


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


def _check(contexts: list[int], batches: list[int], repeats: int, backend: str, has_shape: bool) -> None:
    faults = [
        f"--{name} is {n}; expected at least 1" for name, ns in (("context", contexts), ("batch", batches)) for n in ns if n < 1
    ]
    if repeats < 1:
        faults.append(f"--repeats is {repeats}; expected at least 1")
    if backend not in _BACKENDS:
        faults.append(f"--backend is {backend!r}; expected one of {', '.join(_BACKENDS)}")
    if not has_shape:
        faults.append("--picture and --memory belong to --shape; expected --shape beside them")
    if faults:
        raise UsageError("; ".join(faults))


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
