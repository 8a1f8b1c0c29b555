"""Pictures of a report as SVG text: lines and heat maps. Knows numbers and labels, not what they mean.

Colours are classes that the page's style sheet defines for light and dark; every picture has a title and a description that a
screen reader speaks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 16, 34, 46
_LIGHT_CELL = 0.72  # above it the text of a cell changes colour
NUM_COLOURS = 8
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: what it shows, whether it is logarithmic (ticks at powers of two with `binary`), how its ticks are written."""

    label: str
    log: bool = False
    binary: bool = False
    tick: Callable[[float], str] = lambda value: f"{value:.3g}"


def line_chart(title: str, description: str, x: Axis, y: Axis, lines: Mapping[str, Sequence[Point]]) -> str:
    """Return a chart of named lines with marked points; points that a logarithmic axis cannot show are left out."""
    drawn = {name: [p for p in points if _fits(p[0], x) and _fits(p[1], y)] for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs, ys = ([p[i] for points in drawn.values() for p in points] for i in (0, 1))
    to_x = _scale(min(xs), max(xs), x.log, _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(min(ys) if y.log else min(0.0, *ys), max(ys), y.log, _HEIGHT - _BOTTOM, _TOP)
    body = [_axes(x, y, to_x, to_y, (min(xs), max(xs)), (min(ys) if y.log else 0.0, max(ys)))]
    for index, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in points)
        colour = f"c{index % NUM_COLOURS}"
        body.append(f'<polyline class="line {colour}" points="{path}"/>')
        for a, b in points:
            tip = f"{name}: {x.tick(a)}, {y.tick(b)}"
            place = f'cx="{to_x(a):.1f}" cy="{to_y(b):.1f}" r="4"'
            body.append(f'<circle class="dot {colour}" {place}><title>{escape(tip)}</title></circle>')
    legend = "".join(f'<li><span class="key c{i % NUM_COLOURS}"></span>{escape(name)}</li>' for i, name in enumerate(drawn))
    return figure(title, description, (_WIDTH, _HEIGHT), "".join(body), kind="chart") + f'<ul class="legend">{legend}</ul>'


def heat_map(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    axes: tuple[str, str],
    *,
    top: float,
    write: Callable[[float], str],
) -> str:
    """Return a heat map of `cells` [rows][columns], the darkest at `top`; None leaves a cell empty.

    `axes` name what rows and columns are.
    """
    size, left, head = 54, 84, 40
    width, height = left + size * len(columns) + 8, head + 30 * len(rows) + 8
    body = [f'<text class="axis" x="{left}" y="14">{escape(axes[1])}</text>']
    body.append(f'<text class="axis" x="{left - 10}" y="32" text-anchor="end">{escape(axes[0])}</text>')
    for j, name in enumerate(columns):
        body.append(f'<text class="tick" x="{left + size * (j + 0.5)}" y="32" text-anchor="middle">{escape(name)}</text>')
    for i, name in enumerate(rows):
        y = head + 30 * i
        body.append(f'<text class="tick" x="{left - 10}" y="{y + 19}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(cells[i]):
            body.append(_cell(left + size * j, y, size, value, top, write))
    return figure(title, description, (width, height), "".join(body), wide=width > _WIDTH)


def _cell(x: float, y: float, size: int, value: float | None, top: float, write: Callable[[float], str]) -> str:
    if value is None or not math.isfinite(value):
        return f'<rect class="none" x="{x}" y="{y}" width="{size - 2}" height="28"/>'
    share = min(1.0, max(0.0, value / top if top else 0.0))
    shade = "on-dark" if share > _LIGHT_CELL else "on-light"
    return (
        f'<rect class="ground" x="{x}" y="{y}" width="{size - 2}" height="28"/>'
        f'<rect class="heat" fill-opacity="{share:.3f}" x="{x}" y="{y}" width="{size - 2}" height="28"/>'
        f'<text class="value {shade}" x="{x + size / 2 - 1}" y="{y + 19}" text-anchor="middle">{escape(write(value))}</text>'
    )


def figure(title: str, description: str, size: tuple[int, int], body: str, *, wide: bool = False, kind: str = "map") -> str:
    """Return the SVG elements `body` as a picture of `size` (width, height) with its words; a `wide` one scrolls sideways."""
    width, height = size
    style = f' style="min-width:{width}px"' if wide else ""
    spoken = escape(f"{title}. {description}")
    return (
        f'<figure><div class="scroll" tabindex="0"><svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{spoken}"{style}><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{body}</svg></div><figcaption>{escape(description)}</figcaption></figure>"
    )


def _axes(
    x: Axis,
    y: Axis,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ticks(*y_range, y):
        at = to_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(y.tick(value))}</text>')
    for value in ticks(*x_range, x):
        at = to_x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(x.tick(value))}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    # Upright above the axis: beside it, the larger letters of a narrow screen would meet the ticks.
    parts.append(f'<text class="axis" x="4" y="14">{escape(y.label)}</text>')
    return "".join(parts)


def ticks(low: float, high: float, axis: Axis) -> list[float]:
    """Return round numbers within `low` and `high`, at most about ten."""
    if high <= low:
        return [low]
    if axis.log:
        return _log_ticks(low, high, binary=axis.binary)
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, *, binary: bool) -> list[float]:
    base = 2.0 if binary else 10.0
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    within = (1, 2, 5) if not binary and last - first <= 3 else (1,)
    found = [m * base**n for n in range(first, last + 1) for m in within]
    inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside[:: len(inside) // 9 + 1] or [low, high]


def _scale(low: float, high: float, log: bool, start: float, end: float) -> Callable[[float], float]:
    def position(value: float) -> float:
        a, b, v = (math.log(low), math.log(high), math.log(value)) if log else (low, high, value)
        return start + (end - start) * ((v - a) / (b - a) if b > a else 0.5)

    return position


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)
