"""Line charts and heat maps in our colours, as SVG or PNG. Knows numbers and labels, not what they mean.

matplotlib is imported when the first picture is drawn, and keeps none of our settings. The same figure gives the same bytes,
whatever style its user has set.
"""

import hashlib
import io
import logging
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours by name, on a light and on a dark page. Lines can be told apart with every kind of colour vision.
LINES = ("#0072b2", "#d55e00", "#00664f", "#cc5fa2", "#332288", "#6b3d00", "#88908a")
_DARK_LINES = ("#56b4e9", "#e8703a", "#1fd69a", "#f2b8dc", "#7d7bf5", "#f0e442", "#8f8578")
LIGHT = {"ink": "#14181d", "soft": "#4a5561", "rule": "#c9d0d8", "ground": "#ffffff", "card": "#f3f5f7", "warn": "#8a2c0d"}
DARK = {"ink": "#eef1f4", "soft": "#b3bdc8", "rule": "#3b4653", "ground": "#12161b", "card": "#1c222a", "warn": "#ffb59a"}
LIGHT |= {f"line{index}": colour for index, colour in enumerate(LINES)}
DARK |= {f"line{index}": colour for index, colour in enumerate(_DARK_LINES)}

_STYLE: dict[str, Any] = {
    f"{side}tick.{key}": LIGHT[name] for side in "xy" for key, name in (("color", "rule"), ("labelcolor", "ink"))
}
_STYLE |= {"text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["soft"]}
_STYLE |= {key: LIGHT["rule"] for key in ("axes.edgecolor", "grid.color")}
_STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False)
_STYLE |= {"font.family": ["DejaVu Sans"], "font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold"}
_STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "pqkv"}
_SVG = "http://www.w3.org/2000/svg"
_LONGEST_LABEL = 60


def require_matplotlib() -> None:
    """Import matplotlib, which then says nothing of its own.

    Raises
    ------
    UsageError
        If it cannot be imported.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells about its cache of fonts
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"no picture can be drawn: matplotlib cannot be imported ({error}); expected matplotlib 3.8 or newer: "
            "pip install 'matplotlib>=3.8'"
        ) from error


@contextmanager
def our_style() -> Iterator[None]:
    """Let matplotlib draw in our style alone, and leave its settings as they were.

    Raises
    ------
    UsageError
        If matplotlib cannot be imported.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks with which texts are measured; a reader's has them
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # typed by the names that one version of matplotlib has
        settings.update(_STYLE)
        yield


def label(text: str) -> str:
    """Return `text` as a picture can show it: not wider than most are, a question mark for what XML cannot hold."""
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return "".join(c if c.isprintable() else "?" for c in short)


@our_style()
def png(figure: "Figure") -> bytes:
    """Return `figure` as a PNG in the light colours."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, facecolor=LIGHT["ground"], metadata={"Software": None})
    return data.getvalue()


@our_style()
def svg(figure: "Figure", title: str, *, alone: bool = False) -> str:
    """Return `figure` as an SVG element in the colours of the page around it, or, `alone`, as a file that has its own."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(data.getvalue())
    for part in root.findall(f"{{{_SVG}}}metadata") + root.findall(f"{{{_SVG}}}defs[{{{_SVG}}}style]"):
        root.remove(part)  # that style would apply to all elements of the page
    _adapt(root, f"p{hashlib.sha256(data.getvalue()).hexdigest()[:8]}")
    box = root.attrib["viewBox"]
    root.attrib = {"role": "img", "aria-label": label(title), "viewBox": box, "stroke-linejoin": "round"}
    root.attrib |= {"width": box.split()[2], "height": box.split()[3]}
    if alone:
        root.set("xmlns", _SVG)
        root.insert(0, style := ET.Element("style"))
        style.text = colours_css() + "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif!important}"
    return ET.tostring(root, encoding="unicode") + "\n" * alone


def _adapt(root: ET.Element, own: str) -> None:
    """Make the elements part of a page: without name spaces, ids that begin with `own`, colours that are the page's."""
    variables = {colour: f"var(--{name},{colour})" for name, colour in LIGHT.items()}
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        named = {key.split("}")[-1]: value for key, value in element.attrib.items() if element.tag != "g" or key != "id"}
        for key, value in named.items():
            value = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), value)
            named[key] = f"{own}-{value}" if key == "id" else re.sub(r"(url\(#|^#)", rf"\g<1>{own}-", value)
        element.attrib = named
        element.text, element.tail = element.text if element.tag == "text" else None, None  # no line breaks between elements


def colours_css() -> str:
    """Return a style sheet that defines our colours on light and dark pages."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in each.items()) for each in (LIGHT, DARK))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


_MARKS, _DASHES = "osD^vPX", ("-", "--", ":")
_HEAT = "cividis"  # looks the same with every kind of colour vision, and is readable on light and dark pages
_BRIGHT, _ON_BRIGHT, _ON_DARK = 0.46, "#000000", "#fefefe"  # from this share of the heat on, black text is read more easily
_CELL, _STRIP_WIDTH, _STRIPS_HEIGHT, _MARGIN = (50, 24), 6, 360, 90  # pixels

Lines = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: what it shows, whether it is logarithmic (ticks at powers of two with `binary`), how its ticks are written."""

    label: str
    log: bool = False
    binary: bool = False
    tick: Callable[[float], str] = lambda value: f"{value:.3g}"

    def shows(self, value: float) -> bool:
        """Return whether `value` has a place on this axis."""
        return math.isfinite(value) and (value > 0 or not self.log)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Shaded cells [rows][columns]; None leaves a cell empty.

    Attributes
    ----------
    axes
        What rows and columns are.
    top
        The value of the brightest shade; the darkest is 0.
    write
        How values are written into their cells.
    steps
        For narrow cells without text: ascending values at which the shade changes, shown in a key.
    name
        Written above the map.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    axes: tuple[str, str]
    top: float = 1.0
    write: Callable[[float], str] = str
    steps: Sequence[float] = ()
    name: str = ""


@our_style()
def line_chart(
    x: Axis, y: Axis, lines: Lines, *, main: str = "", title: str = "", size: tuple[int, int] = (600, 400)
) -> "Figure":
    """Return a chart of named lines with marked points; points that an axis cannot show are left out.

    `main` names the line that is drawn first and thickest. `size` is in pixels.
    """
    shown = {name: [p for p in points if x.shows(p[0]) and y.shows(p[1])] for name, points in lines.items()}
    names = sorted((name for name, points in shown.items() if points), key=lambda name: name != main)
    figure = _figure(*size)
    axes = figure.add_subplot(title=label(title))
    for index, name in enumerate(names):
        style: dict[str, Any] = {"color": LINES[index % len(LINES)], "linestyle": _DASHES[index // len(LINES) % 3]}
        style |= {"marker": _MARKS[index % len(_MARKS)], "markersize": 7, "linewidth": 1.8}
        strong = {"marker": "*", "markersize": 14, "linewidth": 3, "zorder": 4} if name == main else {}
        axes.plot(*zip(*shown[name], strict=True), **style | strong)
    _scale(axes.xaxis, x, [p[0] for name in names for p in shown[name]])
    _scale(axes.yaxis, y, [p[1] for name in names for p in shown[name]])
    axes.grid(visible=True)
    legend = figure.legend(axes.lines, list(map(str, range(len(names)))), loc="outside lower left", ncols=2, fontsize=12)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(label(name))  # only now: a legend leaves out what begins with an underscore
    return figure


def _scale(side: Any, axis: Axis, values: Sequence[float]) -> None:
    """Give one side of a chart (an axis of matplotlib) its label, its scale and round ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    locator: Any = MaxNLocator(5)
    if axis.log:
        base = 2 if axis.binary else 10
        (side.axes.set_xscale if side.axis_name == "x" else side.axes.set_yscale)("log", base=base)
        if values and (ratio := max(values) / min(values)) >= base:
            locator = LogLocator(base, (1, 2, 5) if base == 10 and ratio < 1000 else (1,), numticks=12)
    elif side.axis_name == "y" and values and min(values) >= 0:
        side.axes.set_ylim(0, 1.08 * max(values) or 1)
    side.set_major_locator(locator)
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: axis.tick(value)))
    side.set_label_text(axis.label)


@our_style()
def heat_maps(*maps: HeatMap) -> "Figure":
    """Return `maps` side by side."""
    widths = [len(each.columns) * (_STRIP_WIDTH if each.steps else _CELL[0]) + _MARGIN for each in maps]
    heights = [len(each.rows) * _row_height(each) + _MARGIN + 50 * bool(each.steps) for each in maps]
    figure = _figure(sum(widths), max(heights))
    for each, axes in zip(maps, figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0], strict=True):
        (_draw_strips if each.steps else _draw_cells)(axes, each)
        axes.set_title(label(each.name), loc="left")
        axes.set_ylabel(each.axes[0])
        axes.set_xlabel(each.axes[1])
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
    return figure


def _row_height(each: HeatMap) -> int:
    return max(3, min(14, _STRIPS_HEIGHT // len(each.rows))) if each.steps else _CELL[1]


def _draw_cells(axes: "Axes", each: HeatMap) -> None:
    values = _numbers(each)
    top = each.top or 1
    axes.imshow(values, cmap=_HEAT, vmin=0, vmax=top, aspect="auto", interpolation="none")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = _ON_BRIGHT if value > _BRIGHT * top else _ON_DARK if value <= top else LIGHT["soft"]
            axes.text(j, i, "–" if math.isnan(value) else each.write(value), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(each.columns)), each.columns)
    axes.set_yticks(range(len(each.rows)), each.rows)
    axes.set_xticks([j + 0.5 for j in range(len(each.columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(each.rows) - 1)], minor=True)
    axes.grid(which="minor", color=LIGHT["ground"], linewidth=2)


def _draw_strips(axes: "Axes", each: HeatMap) -> None:
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm(each.steps, 256, extend="both")
    image = axes.imshow(_numbers(each), cmap=_HEAT, norm=norm, aspect="auto", interpolation="none")
    every = math.ceil(15 / _row_height(each))  # labels that would touch each other are left out
    axes.set_yticks(range(0, len(each.rows), every), each.rows[::every])
    axes.set_xticks([])
    key = axes.figure.colorbar(image, ax=axes, orientation="horizontal", ticks=each.steps, aspect=30)
    key.ax.set_xticklabels([f"{value:g}" if value >= 1 else f"1/{1 / value:g}" for value in each.steps])


def _numbers(each: HeatMap) -> list[list[float]]:
    """Return the cells of a map, NaN where there is nothing."""
    return [[math.nan if value is None or not math.isfinite(value) else value for value in row] for row in each.cells]


def _figure(width: int, height: int) -> "Figure":
    """Return an empty figure of so many pixels; SVG counts in points, of which each becomes one."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")
