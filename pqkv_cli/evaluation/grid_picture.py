"""Grids of what was found by prompt length and depth, side by side as one SVG file for a document. Knows cells; no records."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from pqkv_cli.evaluation.report_svg import heat_map

_GAP, _HEAD = 18, 26
# The page around a document may be light or dark; the colours of a report, for a file that stands alone.
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#14181d}.axis{fill:#4a5561}.heat{fill:#0b5a86}.ground{fill:#eef1f4}"
    ".none{fill:none;stroke:#c9d0d8}.value{font-weight:600}.on-dark{fill:#fff}.name{font-size:15px;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#eef1f4}.axis{fill:#b3bdc8}.heat{fill:#8ccdf2}.ground{fill:#1c222a}"
    ".none{stroke:#3b4653}.on-dark{fill:#06202e}}"
)

Cell = Mapping[str, Any]


def grids_svg(panels: Mapping[str, Sequence[Cell]], side: Mapping[str, str]) -> str:
    """Return one SVG with a grid per panel.

    Parameters
    ----------
    panels
        Cells by the panel's name: ``length`` (tokens), ``depth`` (0 to 1) and the shares found.
    side
        Which share a panel shows: ``baseline`` or ``quantized``.
    """
    drawn, x, height = [], 0, 0
    for name, cells in panels.items():
        inner, width, tall = _panel(name, cells, side[name])
        drawn.append(f'<text class="name" x="{x + 84}" y="16">{escape(name)}</text>')
        drawn.append(f'<svg x="{x}" y="{_HEAD}" width="{width}" height="{tall}" viewBox="0 0 {width} {tall}">{inner}</svg>')
        x, height = x + width + _GAP, max(height, tall + _HEAD)
    width = max(0, x - _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape('; '.join(panels))}</title><style>{_STYLE}</style>{''.join(drawn)}</svg>\n"
    )


def _panel(name: str, cells: Sequence[Cell], side: str) -> tuple[str, int, int]:
    """Return the inside of one grid, its width and its height."""
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    found = {(c["length"], c["depth"]): c[side] for c in cells}
    figure = heat_map(
        name,
        name,
        [f"{100 * depth:.0f} %" for depth in depths],
        [f"{length:,}" for length in lengths],
        [[found.get((length, depth)) for length in lengths] for depth in depths],
        ("depth", "prompt, tokens"),
        top=1.0,
        write=lambda value: f"{100 * value:.0f}",
    )
    made = re.search(r'<svg [^>]*viewBox="0 0 (\d+) (\d+)"[^>]*>(.*)</svg>', figure, re.DOTALL)
    assert made is not None  # a heat map is one SVG
    return made[3], int(made[1]), int(made[2])
