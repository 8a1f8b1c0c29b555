"""Which pictures there are, and what each shows. Knows records, artifacts and measurements; no page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.summary import Summary
from pqkv_cli.cache.schedule import first_exact, num_pages
from pqkv_cli.evaluation.channels import ChannelPeaks, over_median, pooled
from pqkv_cli.evaluation.record import OURS
from pqkv_cli.report.charts import Axis, HeatMap, Lines, heat_maps, line_chart, png, svg
from pqkv_cli.report.rows import SIDES_OF_RECORDS, Record, Table, size, tokens
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.layout import PAGE_TOKENS

_LEAST_KL = 1e-7  # what a loss of zero is drawn as
_BITS = Axis("bits per channel, everything counted")
_KL = Axis("KL divergence, bits per token", log=True, tick=lambda value: f"{value:.2g}")
_CONTEXT = Axis("tokens in the cache", log=True, binary=True, tick=tokens)
_CONTEXTS = tuple(2**n for n in range(9, 18))
_MOST_COLUMNS = 64
_STEPS = (0.25, 0.5, 1, 2, 4, 8, 16)  # times the median channel
_SPACES = (("plain", "as the model makes them"), ("coded", "in code space"))

Cell = Mapping[str, Any]
Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG element, what it is of, what is seen in it, and the numbers of its lines."""

    title: str
    note: str
    svg: str
    numbers: Table | None = None


def _chart(title: str, note: str, x: Axis, y: Axis, lines: Lines, main: str = "") -> list[Picture]:
    """Return a picture of `lines` with their numbers; none where there is nothing to see."""
    if not any(x.shows(a) and y.shows(b) for points in lines.values() for a, b in points):
        return []
    by_x = [dict(points) for points in lines.values()]
    rows = [[x.tick(at), *(y.tick(line[at]) if at in line else "–" for line in by_x)] for at in sorted(set().union(*by_x))]
    return [Picture(title, note, svg(line_chart(x, y, lines, main=main), title), Table(y.label, (x.label, *lines), rows))]


def _lowest(points: Iterable[tuple[str, float, float]]) -> Lines:
    """Return named points as lines; of two at one place the lower: what was timed several times shows its fastest."""
    lines: dict[str, dict[float, float]] = {}
    for name, x, y in points:
        line = lines.setdefault(name, {})
        line[float(x)] = min(float(y), line.get(float(x), float(y)))
    return {name: sorted(line.items()) for name, line in lines.items()}


def pareto(points: Points) -> list[Picture]:
    """Return bits against loss of every method."""
    return [Picture("Accuracy per bit", "", svg(_pareto_chart(points), "Accuracy per bit"))] if points else []


def pareto_png(points: Points, title: str) -> bytes:
    """Return the same as a file that stands alone."""
    return png(_pareto_chart(points, title=title, size=(720, 480)))


def _pareto_chart(points: Points, **words: Any) -> Any:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda p: float(p["bits_per_channel"])):
        name = OURS if point.get("artifact_sha256") else str(point["method"])
        lines.setdefault(name, []).append((float(point["bits_per_channel"]), max(float(point["kl_bits"]), _LEAST_KL)))
    return line_chart(_BITS, _KL, dict(sorted(lines.items())), main=OURS, **words)


def divergence(records: Sequence[Record]) -> list[Picture]:
    """Return KL divergence by context length, and by generated step, of every record that has it."""
    pictures = []
    for key, word, title in (
        ("by_context", "tokens read", "Divergence by context length"),
        ("by_step", "tokens written", "Divergence along a continuation"),
    ):
        lines = {
            f"{r['task']}, mode {r['mode']}": [(float(cell["to"]), float(cell["kl_bits"])) for cell in r["metrics"][key]]
            for r in records
            if key in r["metrics"]
        }
        x = Axis(word, log=True, binary=True, tick=lambda value: f"{value:,.0f}")
        pictures += _chart(title, f"Mean KL divergence per token against {word}.", x, _KL, lines)
    return pictures


def recall_grids(record: Record) -> list[Picture]:
    """Return what was found by prompt length and depth, uncompressed and compressed; none without a grid."""
    pictures = []
    for side, word in SIDES_OF_RECORDS.items() if (cells := record["metrics"].get("grid")) else ():
        title = f"{record['task']}, mode {record['mode']}, {word}"
        note = f"Percent found by prompt length and depth; {sum(cell[side] for cell in cells) / len(cells):.0%} in all."
        pictures.append(Picture(title, note, svg(heat_maps(recall_map("", cells, side)), title)))
    return pictures


def recall_map(name: str, cells: Sequence[Cell], side: str) -> HeatMap:
    """Return what share was found at every prompt length (tokens) and depth (0 to 1), of ``baseline`` or ``quantized``."""
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    shares = {(c["length"], c["depth"]): c[side] for c in cells}
    rows = [[shares.get((length, depth)) for length in lengths] for depth in depths]
    names = [f"{100 * depth:.0f} %" for depth in depths], [f"{length:,}" for length in lengths]
    return HeatMap(*names, rows, ("depth", "prompt length, tokens"), write=lambda share: f"{100 * share:.0f}", name=name)


def layer_errors(header: Header) -> list[Picture]:
    """Return the relative squared error of every layer and head, keys and values, on one scale."""
    coded = {str(layer): error for layer, error in enumerate(header.relative_error) if error is not None}
    top = max((value for error in coded.values() for side in SIDES for value in getattr(error, side)), default=0.0)
    pictures = []
    for side in SIDES if coded else ():
        errors = [getattr(error, side) for error in coded.values()]
        heads, rows = _padded(errors)
        figure = heat_maps(HeatMap([*coded], heads, rows, ("layer", f"{side}, head"), top, _thousandths))
        note = f"Relative squared error of {side} in thousandths, by layer and head, on calibration text."
        pictures.append(Picture(f"Error of {side}", note, svg(figure, f"Error of {side}")))
    return pictures


def _padded(rows: Sequence[Sequence[float]]) -> tuple[list[str], list[list[float | None]]]:
    """Return the numbers of the columns of `rows`, and `rows` at equal length."""
    width = max(map(len, rows))
    return list(map(str, range(width))), [[*row, *[None] * (width - len(row))] for row in rows]


def _thousandths(value: float) -> str:
    return f"{1000 * value:.2g}" if value < 0.1 else f"{1000 * value:.0f}"


def outlier_channels(peaks: Sequence[ChannelPeaks]) -> list[Picture]:
    """Return the channels of keys and values before and after the transform; none without `peaks`."""
    pictures = []
    for side, (space, words) in [(side, space) for side in SIDES for space in _SPACES] if peaks else ():
        layers = {str(p.layer): pooled(over_median(getattr(p, space)), _MOST_COLUMNS) for p in peaks if p.side == side}
        channels, rows = _padded(list(layers.values()))
        worst = max(layers, key=lambda layer: max(layers[layer]))
        title = f"{side.capitalize()} {words}"
        note = f"The largest peaks at {max(layers[worst]):.1f} times the median channel of its head, in layer {worst}."
        axes = ("layer", "channel; below it, times the median channel")
        figure = heat_maps(HeatMap([*layers], channels, rows, axes, steps=_STEPS))
        pictures.append(Picture(title, note, svg(figure, title)))
    return pictures


def memory(summary: Summary) -> list[Picture]:
    """Return cache bytes of one sequence against its length, 16-bit uncompressed and compressed."""
    plain = [(float(n), float(n * summary.baseline_bytes_per_token)) for n in _CONTEXTS]
    coded = [(float(n), compressed_bytes(summary, n)) for n in _CONTEXTS]
    sizes = f"{size(coded[-1][1])} instead of {size(plain[-1][1])}"
    note = f"Cache of one sequence by its length, from the artifact's numbers: at {_CONTEXTS[-1]:,} tokens {sizes}."
    y = Axis("bytes", log=True, binary=True, tick=size)
    lines = {"compressed": coded, "uncompressed (bf16)": plain}
    return _chart("Memory against context", note, _CONTEXT, y, lines, "compressed")


def compressed_bytes(summary: Summary, count: int) -> float:
    """Return the bytes of a compressed cache of `count` tokens: codes in whole pages, exact tokens and dense layers in bf16."""
    window = summary.cache.window_tokens
    coded = num_pages(count, window) * PAGE_TOKENS
    exact = count - first_exact(count, window) + (summary.cache.num_sinks if coded else 0)
    plain = summary.baseline_bytes_per_token - summary.dense_bytes_per_token
    return coded * summary.code_bytes_per_token + exact * plain + count * summary.dense_bytes_per_token


def speed(bench: Mapping[str, Any]) -> list[Picture]:
    """Return milliseconds per token against cached tokens, of every cache that ``pqkv bench`` timed; none without times."""
    rows = bench.get("tokens", ())
    lines = _lowest((name, row["context"], times["p50"]) for row in rows for name, times in row["ms_per_token"].items())
    where = bench["environment"]["device"] if lines else ""
    note = f"Median milliseconds of one decode step by the tokens in the cache, one sequence, {where}."
    return _chart("Speed against context", note, _CONTEXT, Axis("ms per token"), lines, OURS)


def shape_pictures(document: Mapping[str, Any], shape: str) -> list[Picture]:
    """Return speed and memory of one shape of ``pqkv bench --shape``: of whole steps, or where none were timed of attention."""

    def line(name: str, row: Mapping[str, Any]) -> str:
        return f"{name}, {row['format']}" if name == OURS else name

    steps = [row for row in document["tokens"] if row["shape"] == shape]
    attention = [row for row in document["attention"] if row["shape"] == shape]
    attention = [row for row in attention if row["batch"] == min(each["batch"] for each in attention)]
    times = [(line(name, row), row["context"], ms["p50"]) for row in steps for name, ms in row["ms_per_token"].items()]
    held = [(line(name, row), row["context"], count / 1e9) for row in steps for name, count in row["cache_bytes"].items()]
    for row in attention if not steps else ():
        for name, side, content in ((OURS, "codes", "code"), ("static cache", "static", "dense")):
            times.append((line(name, row), row["context"], row[f"{side}_ms"]["p50"]))
            held.append((line(name, row), row["context"], row[f"{content}_bytes"] / 1e9))
    what = "one decode step" if steps else "attention of one layer for one token"
    note = f"Median milliseconds of {what} on {document['environment']['device']}: lower is better."
    pictures = _chart(f"{shape}: speed", note, _CONTEXT, Axis("ms"), _lowest(times))
    note = "Gigabytes of the cache: lower is better."
    return pictures + _chart(f"{shape}: memory", note, _CONTEXT, Axis("GB", log=True), _lowest(held))
