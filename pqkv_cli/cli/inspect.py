"""``pqkv inspect``: what a model, a run or an artifact is."""

from typing import TYPE_CHECKING

from pqkv_cli.cli.options import DebugOption, GpuOption, JsonOption, RunOption, TargetArgument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pqkv_cli.artifact.summary import LayerRow, Summary
    from pqkv_cli.pipeline.capacity import Capacity
    from pqkv_cli.pipeline.inspect import Inspection, StageState
    from pqkv_cli.specs import LayerGeometry, ModelGeometry

_BF16_BYTES = 2
_DENSE_BITS = 16


def inspect(
    target: TargetArgument = None,
    run: RunOption = None,
    gpu: GpuOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what a model, a run or an artifact is.

    That is geometry, what of each layer is quantized and why not, finished stages, bits, bytes per token, and error per layer.

    Example: pqkv inspect my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.words import target_of

    output = Output(json_target)
    found = target_of(target, run, TerminalReporter())

    from pqkv_cli.pipeline.capacity import parse_device_bytes
    from pqkv_cli.pipeline.inspect import inspect_target

    inspection = inspect_target(found, None if gpu is None else parse_device_bytes(gpu))
    output.result({"schema": "pqkv.inspect/1", **inspection.document()}, *_tables(inspection))


def _tables(found: "Inspection") -> "list[RenderableType]":
    shown: list[RenderableType] = []
    if found.model is not None:
        shown.append(_model_table(found.label, found.model))
    if found.stages is not None:
        shown.append(_stage_table(found.label, found.stages))
    if found.artifact is not None:
        shown += _artifact_tables(found.artifact)
    if found.backend is not None:
        shown.append(f"attention over codes on this machine: {found.backend.name} ({found.backend.reason})")
    if found.capacity is not None:
        shown.append(_capacity_table(found.capacity))
    return shown


def _model_table(label: str, model: "ModelGeometry") -> "RenderableType":
    from pqkv_cli.cli.output import table

    notes = model.notes or ("",) * len(model.layers)
    layers = list(zip(model.layers, notes, model.cached_channels, strict=True))
    rows = [(span, *_layer_cells(*layer)) for span, layer in _spans(layers)]
    columns = ("layers", "heads", "kv heads", "head dim", "rotary dim", "bytes/token (bf16)", "quantized")
    total = model.cache_bytes_per_token(_BF16_BYTES)
    title = f"{label}: {model.model_type} of {model.max_positions:,} positions, {total:,} cache bytes per token"
    decoded = f"\nattention decodes the codes at every step (right, but slow): {model.decoded_reason}"
    return table(title + (decoded if model.decoded_reason else ""), columns, rows)


def _layer_cells(layer: "LayerGeometry", note: str, channels: int) -> tuple[object, ...]:
    rotary = None if layer.rotary is None else layer.rotary.rotary_dim
    quantized = f"no: {layer.dense_reason}" if layer.dense_reason else f"yes{'; ' if note else ''}{note}"
    return layer.num_heads, layer.num_kv_heads, layer.head_dim, rotary, channels * _BF16_BYTES, quantized


def _spans(rows: "list[tuple[LayerGeometry, str, int]]") -> "list[tuple[str, tuple[LayerGeometry, str, int]]]":
    """Join neighbouring layers of one kind: ``0-31`` instead of 32 equal rows."""
    from itertools import groupby

    spans, first = [], 0
    for row, group in groupby(rows):
        last = first + len(list(group)) - 1
        spans.append((str(first) if first == last else f"{first}-{last}", row))
        first = last + 1
    return spans


def _capacity_table(found: "Capacity") -> "RenderableType":
    from pqkv_cli.cli.output import table

    rows = [
        ("bf16" if row.bits == _DENSE_BITS else f"{row.bits:g} b/ch", row.bytes_per_token, *row.tokens) for row in found.rows
    ]
    title = (
        f"tokens per row that fit in {found.device_bytes / 1e9:.4g} GB, beside {found.weight_bytes / 1e9:.4g} GB of weights; "
        f"{found.reserved_bytes / 1e9:.3g} GB are left to activations\n"
        f"counted too: {found.cache.num_sinks} first and {found.cache.window_tokens} recent tokens exact, codebooks, one layer "
        "exact while a prompt is read"
    )
    return table(title, ("cache", "bytes/token", *(f"batch {batch}" for batch in found.batches)), rows)


def _stage_table(label: str, stages: "tuple[StageState, ...]") -> "RenderableType":
    from pqkv_cli.cli.output import table

    rows = [(s.stage, s.state, s.facts.get("seconds")) for s in stages]
    return table(f"run {label}", ("stage", "state", "seconds"), rows)


def _artifact_tables(artifact: "Summary") -> "list[RenderableType]":
    from pqkv_cli.cli.output import table

    cached = artifact.code_bytes_per_token + artifact.dense_bytes_per_token
    facts = [
        ("model", artifact.label),
        ("sha256", artifact.sha256),
        ("bits per channel", artifact.total_bits),
        ("bits per channel, keys / values", f"{artifact.keys_bits:.4g} / {artifact.values_bits:.4g}"),
        ("bytes per token", cached),
        ("bytes per token, uncompressed (bf16)", artifact.baseline_bytes_per_token),
        ("times smaller", artifact.baseline_bytes_per_token / cached),
        ("bytes of codebooks and transforms", artifact.table_bytes),
        ("tokens whose codes take as much", artifact.table_tokens),
        *([("values predicted from keys", f"{artifact.predicted_layers} layers")] * bool(artifact.predicted_layers)),
        ("kept exact", f"{artifact.cache.num_sinks} first tokens, {artifact.cache.window_tokens} most recent"),
    ]
    columns = ("layer", "keys b/ch", "error", "worst head", "values b/ch", "error", "worst head", "dense because")
    layers = table(
        "bits per channel and relative squared error per layer", columns, [_error_cells(row) for row in artifact.layers]
    )
    return [table("artifact", ("fact", "value"), facts), layers]


def _error_cells(row: "LayerRow") -> tuple[object, ...]:
    sides = [
        (None, None, None) if side is None else (side.bits_per_channel, side.mean_error, side.worst_error)
        for side in (row.keys, row.values)
    ]
    return str(row.layer), *sides[0], *sides[1], row.dense_reason
