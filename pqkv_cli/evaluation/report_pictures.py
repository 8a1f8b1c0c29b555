"""Which pictures a report has, and what each shows. Knows records, artifacts and how to draw; no page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.summary import Summary
from pqkv_cli.cache.schedule import first_exact, num_pages
from pqkv_cli.evaluation.report_svg import Axis, heat_map, line_chart
from pqkv_cli.evaluation.report_tables import size
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.layout import PAGE_TOKENS

Record = Mapping[str, Any]
_CONTEXTS = tuple(2**n for n in range(9, 18))
_KL_AXIS = Axis("KL divergence, bits per token", log=True, tick=lambda v: f"{v:.2g}")


def pareto(points: Sequence[Mapping[str, Any]]) -> str:
    """Return bits against loss of every method, ours first; empty without points."""
    lines: dict[str, list[tuple[float, float]]] = {}
    named = [("" if point.get("artifact_sha256") else str(point["method"]), point) for point in points]
    for method, point in sorted(named, key=lambda pair: (pair[0], pair[1]["bits_per_channel"])):
        name = method or "pqkv"
        lines.setdefault(name, []).append((float(point["bits_per_channel"]), float(point["kl_bits"])))
    description = "Bits per channel against KL divergence from the uncompressed model; lower left is better."
    return line_chart("Accuracy per bit", description, Axis("bits per channel, everything counted"), _KL_AXIS, lines)


def divergence(records: Sequence[Record]) -> str:
    """Return KL divergence by context length, or by generated step, of every record that has it."""
    charts = []
    for key, word, title in (
        ("by_context", "tokens read", "Divergence by context length"),
        ("by_step", "tokens written", "Divergence along a continuation"),
    ):
        lines = {
            f"{r['task']}, mode {r['mode']}": [(float(cell["to"]), float(cell["kl_bits"])) for cell in r["metrics"][key]]
            for r in records
            if key in r["metrics"]
        }
        axis = Axis(word, log=True, binary=True, tick=lambda v: f"{v:.0f}")
        description = f"Mean KL divergence per token against {word}; where nothing is lost yet there is no point."
        charts.append(line_chart(title, description, axis, _KL_AXIS, lines))
    return f'<div class="pair">{"".join(f"<div>{chart}</div>" for chart in charts if chart)}</div>' if any(charts) else ""


def recall_grids(record: Record) -> str:
    """Return what was found by prompt length and depth, uncompressed and compressed; empty without a grid."""
    cells = record["metrics"].get("grid")
    if not cells:
        return ""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    by_place = {(cell["length"], cell["depth"]): cell for cell in cells}
    maps = []
    for side, word in (("baseline", "uncompressed"), ("quantized", "compressed")):
        rows = [[by_place.get((length, depth), {}).get(side) for length in lengths] for depth in depths]
        mean = sum(cell[side] for cell in cells) / len(cells)
        maps.append(
            heat_map(
                f"{record['task']}, mode {record['mode']}, {word}",
                f"{record['task']}, mode {record['mode']}, {word}: percent found by length and depth; {mean:.0%} in all.",
                [f"{100 * depth:.0f} %" for depth in depths],
                [f"{length:,}" for length in lengths],
                rows,
                ("depth", "prompt length, tokens"),
                top=1.0,
                write=lambda v: f"{100 * v:.0f}",
            )
        )
    return f'<div class="pair">{"".join(maps)}</div>'


def layer_errors(header: Header) -> str:
    """Return the relative squared error of every layer and head, keys and values, on one scale."""
    coded = [(i, error) for i, error in enumerate(header.relative_error) if error is not None]
    if not coded:
        return ""
    top = max(value for _, error in coded for side in SIDES for value in getattr(error, side))
    maps = []
    for side in SIDES:
        rows = [list(getattr(error, side)) for _, error in coded]
        heads = max(map(len, rows))
        padded = [[*row, *[None] * (heads - len(row))] for row in rows]
        maps.append(
            heat_map(
                f"Error of {side}",
                f"Relative squared error of {side} in thousandths, by layer and head, on calibration text.",
                [str(i) for i, _ in coded],
                [str(head) for head in range(heads)],
                padded,
                ("layer", f"{side}, head"),
                top=top,
                write=lambda v: f"{1000 * v:.2g}" if v < 0.1 else f"{1000 * v:.0f}",
            )
        )
    return f'<div class="pair">{"".join(maps)}</div>'


def memory(summary: Summary) -> str:
    """Return cache bytes of one sequence against its length, 16-bit uncompressed and compressed."""
    lines: dict[str, list[tuple[float, float]]] = {"uncompressed (bf16)": [], "compressed": []}
    for tokens in _CONTEXTS:
        lines["uncompressed (bf16)"].append((tokens, tokens * summary.baseline_bytes_per_token))
        lines["compressed"].append((tokens, compressed_bytes(summary, tokens)))
    last = {name: points[-1][1] for name, points in lines.items()}
    description = (
        f"Cache of one sequence by its length, from the artifact's numbers: at {_CONTEXTS[-1]:,} tokens "
        f"{size(last['compressed'])} instead of {size(last['uncompressed (bf16)'])}."
    )
    return line_chart(
        "Memory against context",
        description,
        Axis("tokens", log=True, binary=True, tick=_tokens),
        Axis("bytes", log=True, binary=True, tick=size),
        lines,
    )


def speed(bench: Mapping[str, Any]) -> str:
    """Return milliseconds per token against cached tokens, of every cache that ``pqkv bench`` timed; empty without times."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in bench.get("tokens", ()):
        for name, times in row["ms_per_token"].items():
            lines.setdefault(name, []).append((float(row["context"]), float(times["p50"])))
    if not lines:
        return ""
    where = bench["environment"]["device"]
    description = f"Median milliseconds of one decode step by the tokens in the cache, one sequence, {where}; lower is better."
    x = Axis("tokens in the cache", log=True, binary=True, tick=_tokens)
    return line_chart("Speed against context", description, x, Axis("ms per token"), lines)


def _tokens(count: float) -> str:
    return f"{count / 1024:.0f}K" if count >= 1024 else f"{count:.0f}"


def compressed_bytes(summary: Summary, tokens: int) -> float:
    """Return the bytes of a compressed cache of `tokens`: codes in whole pages, exact tokens and dense layers in bf16."""
    window = summary.cache.window_tokens
    coded = num_pages(tokens, window) * PAGE_TOKENS
    exact = tokens - first_exact(tokens, window) + (summary.cache.num_sinks if coded else 0)
    plain = summary.baseline_bytes_per_token - summary.dense_bytes_per_token
    return coded * summary.code_bytes_per_token + exact * plain + tokens * summary.dense_bytes_per_token
