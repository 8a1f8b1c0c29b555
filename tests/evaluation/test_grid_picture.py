"""Grids for a document: every share in its cell, in a file that stands alone."""

import xml.etree.ElementTree as ET

from pqkv_cli.evaluation.grid_picture import grids_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_panels_show_the_side_asked_for() -> None:
    cells = [
        {"length": length, "depth": depth, "baseline": 1.0, "quantized": 0.25 if depth else 0.5}
        for length in (512, 1024)
        for depth in (0.0, 1.0)
    ]
    text = grids_svg({"plain <>": cells, "4 b/ch": cells[:3]}, {"plain <>": "baseline", "4 b/ch": "quantized"})
    page = ET.fromstring(text)
    plain, coded = page.findall(f"{SVG}svg")
    assert [t.text for t in plain.iter(f"{SVG}text") if "value" in t.attrib["class"]] == ["100"] * 4
    assert [t.text for t in coded.iter(f"{SVG}text") if "value" in t.attrib["class"]] == ["50", "50", "25"]
    assert [r.attrib["class"] for r in coded.iter(f"{SVG}rect")].count("none") == 1
    assert page.findtext(f"{SVG}title") == "plain <>; 4 b/ch"
    assert "prefers-color-scheme:dark" in (page.findtext(f"{SVG}style") or "")
    assert float(coded.attrib["x"]) > float(plain.attrib["width"])
