"""Pictures for themselves: lines, marks and cells that are there, colours that everyone can tell apart."""

import base64
import io
import itertools
import math
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from pqkv_cli.report.charts import (
    _BRIGHT,
    _HEAT,
    _ON_BRIGHT,
    _ON_DARK,
    DARK,
    LIGHT,
    LINES,
    Axis,
    HeatMap,
    heat_maps,
    line_chart,
    png,
    svg,
)
from tools.draw_grids import grids_svg

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(picture).iter() if element.tag.split("}")[-1] == "text"]


def pixels(picture: str) -> list[np.ndarray]:
    """Return the images of a picture, [rows, columns, RGBA] each."""
    from matplotlib.image import imread

    links = [e.attrib["href"] for e in ET.fromstring(picture).iter() if e.tag.split("}")[-1] == "image"]
    return [imread(io.BytesIO(base64.b64decode(link.split(",")[1])), format="png") for link in links]


def test_panels_of_a_document_show_the_side_asked_for() -> None:
    cells = [
        {"length": length, "depth": depth, "baseline": 1.0, "quantized": 0.25 if depth else 0.5}
        for length in (512, 1024)
        for depth in (0.0, 1.0)
    ]
    panels, sides = {"plain <>": cells, "4 b/ch": cells[:3]}, {"plain <>": "baseline", "4 b/ch": "quantized"}
    text = grids_svg(panels, sides)
    assert grids_svg(panels, sides) == text
    found = texts(text)
    assert [t for t in found if t.isdigit()].count("100") == 4
    assert [t for t in found if t in ("50", "25", "–")] == ["50", "50", "25", "–"]
    assert "plain <>" in found and "4 b/ch" in found and "1,024" in found and "100 %" in found
    page = ET.fromstring(text)
    assert page.tag == f"{SVG}svg" and "prefers-color-scheme:dark" in (page.findtext(f"{SVG}style") or "")
    assert float(page.attrib["width"]) > float(page.attrib["height"])


def test_points_an_axis_cannot_show_are_left_out() -> None:
    lines = {"a": [(1, 0.0), (2, 0.1), (3, math.nan), (4, 0.2)], "b": [(1, 0.0)]}
    figure = line_chart(Axis("x"), Axis("y", log=True), lines)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[2, 4]]
    assert "a" in texts(svg(figure, "t")) and "b" not in texts(svg(figure, "t"))


def test_names_are_shown_as_they_are_and_ours_comes_first() -> None:
    figure = line_chart(Axis("x"), Axis("y"), {"_x $a_b$": [(1, 1)], "ours": [(1, 2)]}, main="ours")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "_x $a_b$"]
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths[0] > widths[1]
    assert "_x $a_b$" in texts(svg(figure, "t"))


@pytest.mark.parametrize(
    ("axis", "values", "expected"),
    [
        (Axis("y"), (3.0, 10.0), ["0", "2.5", "5", "7.5", "10"]),
        (Axis("y", log=True), (0.01, 0.2), ["0.01", "0.02", "0.05", "0.1", "0.2"]),
        (Axis("y", log=True), (1e-6, 1e-1), ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1"]),
        (Axis("y", log=True, binary=True), (512, 4096), ["512", "1.02e+03", "2.05e+03", "4.1e+03"]),
    ],
)
def test_ticks_are_round(axis: Axis, values: tuple[float, float], expected: list[str]) -> None:
    figure = line_chart(Axis("x", tick=lambda value: "x"), axis, {"line": [(1, values[0]), (2, values[1])]})
    assert [t for t in texts(svg(figure, "t")) if t not in ("x", "y", "line")] == expected


@pytest.mark.parametrize("axis", [Axis("y"), Axis("y", log=True), Axis("y", log=True, binary=True)])
@pytest.mark.parametrize("value", [0.3, 5.0])
def test_a_single_point_has_ticks(axis: Axis, value: float) -> None:
    figure = line_chart(Axis("x", tick=lambda value: "x"), axis, {"line": [(1, value)]})
    assert len([t for t in texts(svg(figure, "t")) if t not in ("x", "y", "line")]) >= 2


def test_more_lines_than_colours_differ_still() -> None:
    figure = line_chart(Axis("x"), Axis("y"), {str(i): [(1, i)] for i in range(2 * len(LINES))})
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 2 * len(LINES)


def test_cells_have_shades_and_none_is_empty() -> None:
    figure = heat_maps(HeatMap(["r"], ["a", "b", "c"], [[0.0, None, 1.0]], ("row", "column"), write=lambda v: f"{v:.1f}"))
    picture = svg(figure, "t")
    assert [t for t in texts(picture) if t in ("0.0", "–", "1.0")] == ["0.0", "–", "1.0"]
    ((cells,),) = pixels(picture)
    assert cells[1, 3] == 0 and cells[0, :3].sum() < 0.6 < 1.8 < cells[2, :3].sum()


def test_shades_of_strips_go_by_ratio() -> None:
    steps = (0.25, 0.5, 1, 2, 4, 8, 16)
    values = [[0.0, 0.3, 0.4, 1.0, 1.9, 17.0, 999.0]]
    figure = heat_maps(HeatMap(["0"], [""] * 7, values, ("layer", "channel"), steps=steps))
    picture = svg(figure, "t")
    shades = [tuple(cell) for cell in pixels(picture)[0][0]]
    assert shades[1] == shades[2] and shades[3] == shades[4] and shades[5] == shades[6] and len(set(shades)) == 4
    assert {"1/4", "1/2", "16"} <= set(texts(picture))


def test_pictures_are_the_same_twice_and_pngs_are_light() -> None:
    from matplotlib.image import imread

    made = [line_chart(Axis("x"), Axis("y"), {"a": [(1, 1), (2, 3)]}, title="t") for _ in range(2)]
    assert svg(made[0], "t") == svg(made[1], "t") and png(made[0]) == png(made[1])
    assert imread(io.BytesIO(png(made[0])), format="png")[0, 0, :3].tolist() == [1, 1, 1]


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


# What is left of red, green and blue without one kind of cone (Machado et al. 2009), linear.
VISIONS = {
    "full": np.eye(3),
    "no red": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no green": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no blue": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def seen(colour: str, vision: str) -> np.ndarray:
    """Return `colour` in CIE Lab as someone with this vision sees it."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    part = to_xyz @ np.clip(VISIONS[vision] @ linear(colour), 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(part > 0.008856, np.cbrt(part), 7.787 * part + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_lines_can_be_told_apart(page: dict[str, str], vision: str) -> None:
    lines = [page[f"line{i}"] for i in range(len(LINES))]
    near = {(a, b): float(np.linalg.norm(seen(a, vision) - seen(b, vision))) for a, b in itertools.combinations(lines, 2)}
    assert min(near.values()) > 10, "about four times what is just noticed"


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(page: dict[str, str]) -> None:
    for text in ("ink", "soft", "warn"):
        assert contrast(page[text], page["ground"]) >= 4.5, text
    for text in ("ink", "soft"):
        assert contrast(page[text], page["card"]) >= 4.5, text
    for i in range(len(LINES)):
        assert contrast(page[f"line{i}"], page["ground"]) >= 3, i


@pytest.mark.parametrize("share", [0.0, 0.3, _BRIGHT - 0.001, _BRIGHT + 0.001, 1.0])
def test_numbers_in_cells_can_be_read(share: float) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    cell: Any = to_hex(colormaps[_HEAT](share))
    assert contrast(cell, _ON_BRIGHT if share > _BRIGHT else _ON_DARK) >= 4.4
