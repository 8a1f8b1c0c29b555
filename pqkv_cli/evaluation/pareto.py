"""Bits against loss: which methods nothing beats, as numbers and as a picture. Knows records; measures nothing.

Needs matplotlib for the picture alone: ``pip install 'pqkv[report]'``.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = "pqkv.pareto/1"
MISSING = "no picture: matplotlib is not installed; run: pip install 'pqkv[report]'"
_SIZE_INCHES = (9.0, 5.5)
_LEAST_KL = 1e-7
_MARKERS = "osD^vP<X>hp"
_OWN = "pqkv"

Record = Mapping[str, Any]
Point = dict[str, Any]


def pareto_document(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of the picture: one point per complete record, the unbeaten ones marked ``on_front``."""
    points = [_point(record) for record in records if record["status"] == "complete"]
    for point in points:
        point["on_front"] = not any(_beats(other, point) for other in points)
    return {
        "schema": SCHEMA,
        "x": "bits per channel, everything counted",
        "y": "KL divergence, bits per token, mean",
        "points": points,
    }


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_pareto(points: Sequence[Point], title: str, path: Path) -> None:
    """Write a picture (PNG) of `points` of `pareto_document`: one line per method, ours thick and black.

    Needs matplotlib; see `can_draw`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(_OWN if point["artifact_sha256"] else str(point["method"]), []).append(point)
    for index, (name, own) in enumerate(lines.items()):
        own.sort(key=lambda point: float(point["bits_per_channel"]))
        x, y = [p["bits_per_channel"] for p in own], [max(p["kl_bits"], _LEAST_KL) for p in own]
        style: dict[str, Any] = {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)], "linewidth": 1.2}
        style["linestyle"] = "--" if index >= 10 else "-"  # the colors begin again
        if name == _OWN:
            style = {"color": "black", "marker": "*", "linewidth": 2.5, "markersize": 13, "zorder": 5}
        axes.plot(x, y, label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per channel (codes, scales, outliers, exact tokens)")
    axes.set_ylabel("KL divergence from the uncompressed model (bits per token)")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _point(record: Record) -> Point:
    numbers = record["metrics"]
    return {
        "method": record["method"],
        "native_bits": record["native_bits"],
        "bits_per_channel": record["bits_per_channel"]["total"],
        "kl_bits": numbers["kl_bits"]["quantized"],
        "kl_bits_p99": numbers["kl_bits"]["p99"],
        "top1_agreement": numbers["top1_agreement"]["quantized"],
        "perplexity": numbers["perplexity"]["quantized"],
        "artifact_sha256": record["artifact_sha256"],
    }


def _beats(other: Point, point: Point) -> bool:
    """Return whether `other` is no worse in bits and loss, and better in one of them."""
    axes = ("bits_per_channel", "kl_bits")
    return all(other[a] <= point[a] for a in axes) and any(other[a] < point[a] for a in axes)
