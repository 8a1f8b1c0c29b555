"""Draws grids of result records as one picture: ``python tools/draw_grids.py -o FILE NAME=RECORD ...``.

Each record gives two grids, of the uncompressed and of the compressed model on the same prompts.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pqkv_cli.report.charts import heat_maps, svg
from pqkv_cli.report.pictures import Cell, recall_map


def grids_svg(panels: Mapping[str, Sequence[Cell]], side: Mapping[str, str]) -> str:
    """Return one SVG file with a grid per panel, for a document.

    Parameters
    ----------
    panels
        Cells by the panel's name: ``length`` (tokens), ``depth`` (0 to 1) and the shares found.
    side
        Which share a panel shows: ``baseline`` or ``quantized``.
    """
    figure = heat_maps(*(recall_map(name, cells, side[name]) for name, cells in panels.items()))
    return svg(figure, "Percent found by prompt length and depth", alone=True)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", metavar="NAME=RECORD", help="name of a picture and its result record")
    parser.add_argument("-o", "--out", type=Path, required=True)
    wanted = parser.parse_args()
    panels, sides = {}, {}
    for pair in wanted.records:
        name, _, path = pair.partition("=")
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["metrics"]["grid"]
        for side, word in (("baseline", "uncompressed"), ("quantized", "compressed")):
            panels[f"{name}, {word}"], sides[f"{name}, {word}"] = cells, side
    wanted.out.write_text(grids_svg(panels, sides), encoding="utf-8")


if __name__ == "__main__":
    main()
