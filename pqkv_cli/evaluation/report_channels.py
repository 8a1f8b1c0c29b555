"""Pictures of a report that show outlier channels before and after the transform. Knows peaks and how to draw them."""

import math
from collections.abc import Sequence

import torch

from pqkv_cli.evaluation.channels import ChannelPeaks, over_median, pooled
from pqkv_cli.evaluation.report_svg import figure
from pqkv_cli.specs import SIDES, Side

_WIDTH, _LEFT, _HEAD, _FOOT = 460, 44, 8, 74
_MOST_COLUMNS = 64
_LOWEST, _HIGHEST, _SHADES = 1 / 4, 16.0, 8  # times the median channel, from the lightest to the darkest
_TALLEST_ROW, _MAP_HEIGHT = 22, 360

_EXPLAINED = (
    "<p>A channel's largest magnitude over that of the median channel of its head; the largest of all heads is shown. In code "
    "space a channel is as large as its errors matter: keys are scaled by what queries look at, values by the output "
    "projection. So this space is not meant to be flat; it does not change when outliers are put into the model, and each "
    "codebook is as wide as the channels it codes.</p>"
)


def channel_pictures(peaks: Sequence[ChannelPeaks]) -> str:
    """Return for keys and values what `peaks` say before and after the transform; empty without any."""
    if not peaks:
        return ""
    pairs = []
    for side in SIDES:
        own = [p for p in peaks if p.side == side]
        names = [str(p.layer) for p in own]
        before = _strips(side, "as the model makes them", names, [over_median(p.plain) for p in own])
        after = _strips(side, "in code space", names, [over_median(p.coded) for p in own])
        pairs.append(f'<div class="pair">{before}{after}</div>')
    return _EXPLAINED + "".join(pairs)


def _strips(side: Side, state: str, names: Sequence[str], layers: Sequence[torch.Tensor]) -> str:
    """Return one strip of shaded channels per layer."""
    rows = [pooled(values, _MOST_COLUMNS) for values in layers]
    worst = max(range(len(rows)), key=lambda i: max(rows[i]))
    title = f"{side.capitalize()} {state}"
    description = (
        f"{title}: channels by layer; the largest peaks at {max(rows[worst]):.1f} times the median channel of its head, in "
        f"layer {names[worst]}."
    )
    height = max(3, min(_TALLEST_ROW, _MAP_HEIGHT // len(rows)))
    bottom = _HEAD + height * len(rows)
    shown = max(1, math.ceil(14 / height))  # labels that would touch each other are left out
    labels = [
        f'<text class="tick" x="{_LEFT - 8}" y="{_HEAD + height * (i + 0.5) + 5:.0f}" text-anchor="end">{name}</text>'
        for i, name in enumerate(names)
        if i % shown == 0
    ]
    ground = f'<rect class="ground" x="{_LEFT}" y="{_HEAD}" width="{_WIDTH - _LEFT}" height="{height * len(rows)}"/>'
    body = ground + _shaded(rows, height) + "".join(labels) + _key(bottom)
    return figure(title, description, (_WIDTH, bottom + _FOOT), body)


def _shaded(rows: Sequence[Sequence[float]], height: int) -> str:
    """Return one path per shade: a rectangle for every cell would make the page ten times as large."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        width = (_WIDTH - _LEFT) / len(row)
        for j, value in enumerate(row):
            spot = f"M{_LEFT + j * width:.1f} {_HEAD + i * height}h{width:.2f}v{height - 1}h-{width:.2f}z"
            paths.setdefault(shade(value), []).append(spot)
    return "".join(
        f'<path class="heat" fill-opacity="{level / _SHADES:.3f}" d="{"".join(spots)}"/>'
        for level, spots in sorted(paths.items())
        if level
    )


def shade(value: float) -> int:
    """Return how dark `value` times the median is drawn, 0 to 8, in steps of equal ratio."""
    share = math.log(max(value, _LOWEST) / _LOWEST) / math.log(_HIGHEST / _LOWEST)
    return min(_SHADES, round(share * _SHADES))


def _key(bottom: int) -> str:
    parts = [f'<text class="axis" x="{_LEFT}" y="{bottom + 16}">channel, one line per layer</text>']
    parts.append(f'<text class="axis" x="{_LEFT}" y="{bottom + 40}">times the median channel</text>')
    step = (_WIDTH - _LEFT) / 7
    for i in range(7):
        value = _LOWEST * 2.0**i
        written = f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
        x = _LEFT + i * step
        opacity = shade(value) / _SHADES
        parts.append(f'<rect class="ground" x="{x:.0f}" y="{bottom + 48}" width="20" height="12"/>')
        parts.append(f'<rect class="heat" fill-opacity="{opacity:.3f}" x="{x:.0f}" y="{bottom + 48}" width="20" height="12"/>')
        parts.append(f'<text class="tick" x="{x + 25:.0f}" y="{bottom + 59}">{written}</text>')
    return "".join(parts)
