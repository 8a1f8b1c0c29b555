"""``pqkv diff``: what differs between two artifacts."""

from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption
from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pqkv_cli.artifact.difference import ArtifactDiff, LayerPair

_MOST_ROWS = 20


def diff(
    words: Annotated[list[str] | None, typer.Argument(metavar="A B", help="Two runs or artifacts.")] = None,
    run: RunOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what differs between two artifacts: settings, codecs, errors of the layers, and numbers.

    Exits with 0 whether they differ or not, with 1 if one of them cannot be read. With --run, that is A.

    Example: pqkv diff old-run new-run
    """
    from pqkv_cli.cli.output import Output

    output = Output(json_target)
    named = ([run] if run else []) + list(words or [])
    if len(named) != 2:
        raise UsageError(f"found {len(named)} names, expected two runs or artifacts: pqkv diff A B")

    from pqkv_cli.artifact.difference import diff as compare_artifacts
    from pqkv_cli.pipeline.start import target_artifact
    from pqkv_cli.pipeline.target import resolve_target

    a, b = (target_artifact(resolve_target(name)) for name in named)
    found = compare_artifacts(a, b)
    output.result(found.document(), *_shown(found))


def _shown(found: "ArtifactDiff") -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    rows: list[tuple[object, ...]] = [
        ("file", found.a.path, found.b.path),
        ("sha256", found.a.summary.sha256[:12], found.b.summary.sha256[:12]),
        ("bits per channel", found.a.summary.total_bits, found.b.summary.total_bits),
        ("bytes", found.a.file_bytes, found.b.file_bytes),
    ]
    if found.difference.same_content:
        return [table("the same artifact twice", ("fact", "A", "B"), rows)]
    rows += [(pair.field, pair.a, pair.b) for pair in found.difference.fields[:_MOST_ROWS]]
    shown: list[RenderableType] = [table("what differs in the header", ("fact", "A", "B"), rows)]
    if left_out := len(found.difference.fields) - _MOST_ROWS:
        shown += [f"{left_out} more fields differ: see --json -"] if left_out > 0 else []
    columns = ("layer", "bits A", "bits B", "keys error A", "keys error B", "values error A", "values error B")
    layers = [_layer_cells(pair) for pair in found.difference.layers]
    return [*shown, table("relative squared error per layer", columns, layers), *_tensor_lines(found)]


def _layer_cells(pair: "LayerPair") -> tuple[object, ...]:
    errors = pair.keys_error_a, pair.keys_error_b, pair.values_error_a, pair.values_error_b
    return str(pair.layer), pair.bits_a, pair.bits_b, *errors


def _tensor_lines(found: "ArtifactDiff") -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    pairs = found.difference.tensors
    counted = f"{found.difference.num_equal_tensors:,} tensors are equal, {len(pairs):,} differ"
    if not pairs:
        return [counted]
    # The largest differences first; what only one of them has comes before all that.
    ordered = sorted(pairs, key=lambda pair: (pair.largest is not None, -(pair.largest or 0.0)))
    rows = [(pair.name, pair.reason, pair.largest) for pair in ordered[:_MOST_ROWS]]
    title = counted if len(pairs) <= _MOST_ROWS else f"{counted}; the first {_MOST_ROWS}"
    return [table(title, ("tensor", "differs in", "largest difference"), rows)]
