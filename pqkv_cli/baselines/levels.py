"""Levels on a line, as several methods share them: the best ones for a density or for samples, and equally spaced ones.

Knows numbers and groups of channels only.
"""

import math

import torch

from pqkv_cli.baselines.protocol import Payload, unsupported
from pqkv_cli.errors import DataError

_GRID = 20001
_MOST_STEPS = 2000
# Lloyd's steps on samples end when no level moves by more than this share of the range, or after so many.
_FITTED_STEPS = 1000
_SETTLED = 1e-6
# Places between which the best cuts are searched for exhaustively.
_KNOTS = 512


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index (uint8) of the nearest of the rising `levels` [K] for every entry of `x`."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def fitted_levels(x: torch.Tensor, weights: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Return the rising levels [..., K] fp32 of least weighted squared error for entries `x` [..., N], each row on its own.

    Entries are sorted once, after which the cell of a level is a range, and its mass and mean are differences of running
    sums. The best cuts at 512 places are found by dynamic programming, and Lloyd's algorithm (Lloyd 1982) goes on from there
    with all entries. Nothing is random.

    Parameters
    ----------
    x
        [..., N], any float dtype; computed in fp64.
    weights
        [..., N], not negative; a row without any weight counts its entries equally.

    Raises
    ------
    DataError
        If there are fewer entries than levels, or one of them or its weight is not finite, or a weight is negative.
    """
    _check(x, weights, num_levels)
    line, order = x.double().sort(dim=-1)
    mass = weights.double().gather(-1, order)
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, 1.0)
    sums = torch.stack([_running(mass * line**power) for power in range(3)])
    levels = _best_cut_levels(line, sums, num_levels)
    settled = _SETTLED * (line[..., -1:] - line[..., :1])
    for _ in range(_FITTED_STEPS):
        masses, moments = _cells(line, sums[:2], levels)
        # A level whose cell is empty stays where it is.
        means = torch.where(masses > 0, moments / masses.clamp(min=torch.finfo(torch.float64).tiny), levels)
        moved, levels = (means - levels).abs(), means
        if bool((moved <= settled).all()):
            break
    return levels.float()


def _best_cut_levels(line: torch.Tensor, sums: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Return the means [..., K] of the ranges that the sorted `line` [..., N] is best cut into, at knots.

    Knots are dense where there are many entries and where optimal levels are: these lie like the third root of the density
    (Panter and Dite 1951).
    """
    num_entries = line.shape[-1]
    gaps = line.diff(dim=-1)
    spacing = _running((sums[0].diff(dim=-1)[..., 1:] * gaps.square()).pow(1 / 3))
    count = torch.linspace(0, 1, num_entries, dtype=torch.float64).expand_as(spacing)
    measure = (spacing / spacing[..., -1:].clamp(min=torch.finfo(torch.float64).tiny) + count).contiguous()
    size = min(_KNOTS, num_entries)
    inner = torch.searchsorted(measure, measure[..., -1:] * torch.linspace(0, 1, size + 1, dtype=torch.float64)[1:-1])
    first = torch.zeros_like(inner[..., :1])
    knots = torch.cat((first, inner, first + num_entries), dim=-1)
    mass, moment, square = sums.gather(-1, knots.expand(3, *knots.shape))
    masses, moments, squares = (part[..., None, :] - part[..., :, None] for part in (mass, moment, square))
    # costs[i, j]: squared error of the entries from knot i to knot j with one level.
    costs = (squares - moments.square() / masses.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    costs = costs.masked_fill(torch.ones(size + 1, size + 1, dtype=torch.bool).tril(-1), torch.inf)
    total, chosen = costs[..., 0, :], []
    for _ in range(num_levels - 1):
        total, index = (total[..., :, None] + costs).min(dim=-2)
        chosen.append(index)
    ends = [torch.full_like(first, size)]
    for index in reversed(chosen):
        ends.append(index.gather(-1, ends[-1]))
    cuts = knots.gather(-1, torch.cat((first, *reversed(ends)), dim=-1))
    sizes, means = sums[:2].gather(-1, cuts.expand(2, *cuts.shape)).diff(dim=-1)
    nearest = line.gather(-1, cuts[..., :-1].clamp(max=num_entries - 1))
    return torch.where(sizes > 0, means / sizes.clamp(min=torch.finfo(torch.float64).tiny), nearest).cummax(-1).values


def _cells(line: torch.Tensor, sums: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mass and first moment [..., K] of the entries nearest to each of the rising `levels`."""
    inner = torch.searchsorted(line, ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous())
    ends = torch.cat((torch.zeros_like(inner[..., :1]), inner, torch.full_like(inner[..., :1], line.shape[-1])), dim=-1)
    masses, moments = sums.gather(-1, ends.expand(2, *ends.shape)).diff(dim=-1).unbind(0)
    return masses, moments


def _running(x: torch.Tensor) -> torch.Tensor:
    """Return the sums [..., N + 1] of the first 0..N entries of `x` [..., N]."""
    return torch.cat((torch.zeros_like(x[..., :1]), x.cumsum(-1)), dim=-1)


def _check(x: torch.Tensor, weights: torch.Tensor, num_levels: int) -> None:
    if x.shape[-1] < num_levels:
        raise DataError(
            f"found {x.shape[-1]} entries for {num_levels} levels; expected at least one entry per level; "
            "calibrate on more text or choose fewer bits"
        )
    if not bool((torch.isfinite(x) & torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError(
            "found NaN, infinite or negatively weighted entries; expected finite ones with weights >= 0; check the model's "
            "activations in this dtype and calibrate again"
        )


def sphere_levels(dim: int, num_levels: int) -> torch.Tensor:
    """Return the Lloyd-Max levels [K] fp32 of one coordinate of a uniformly random unit vector of `dim` channels.

    Its density is proportional to ``(1 - x^2)^((dim - 3) / 2)``, close to a normal one of variance ``1 / dim``. Lloyd's
    steps (Lloyd 1982, Max 1960) run on a fine grid, so the same numbers come out everywhere.
    """
    x = torch.linspace(-1, 1, _GRID, dtype=torch.float64)
    density = (1 - x.square()).clamp(min=0) ** ((dim - 3) / 2)
    mass, moment = density.cumsum(0), (density * x).cumsum(0)
    # Start at equal shares of probability.
    shares = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    levels = x[torch.searchsorted(mass, shares * mass[-1]).clamp(max=_GRID - 1)]
    zero = torch.zeros(1, dtype=torch.float64)
    for _ in range(_MOST_STEPS):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        upto = torch.cat((edges, torch.tensor([_GRID])))
        masses = torch.cat((zero, mass[upto - 1])).diff()
        means = torch.cat((zero, moment[upto - 1])).diff() / masses
        if bool((means - levels).abs().max() < 1e-7):
            break
        levels = means
    return levels.float()


# Below this many channels per group, scale and zero point cost more than the finest codes.
LEAST_GROUP = 8
PARAMETER_BITS = 32  # a half-precision scale and a half-precision zero point


def quantize_groups(groups: torch.Tensor, nbits: int, clip: float = 1.0) -> Payload:
    """Round `groups` [..., g] fp32 to ``2 ** nbits`` equally spaced levels between their smallest and largest entry.

    Scale and zero point are rounded to half precision first, as they are stored. `clip` shrinks both ends of the range.
    """
    low, high = groups.amin(-1) * clip, groups.amax(-1) * clip
    top = 2**nbits - 1
    zero, scale = low.half(), ((high - low) / top).half()
    steps = (groups - zero.float()[..., None]) / scale.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
    return Payload(steps.round().clamp(0, top).to(torch.uint8), nbits, (scale, zero))


def dequantize_groups(payload: Payload) -> torch.Tensor:
    """Return the groups [..., g] fp32 of `quantize_groups`."""
    scale, zero = payload.scales
    return payload.codes.float() * scale.float()[..., None] + zero.float()[..., None]


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the tokens of `x` [B, Hkv, T, D] with all heads side by side, [B, T, Hkv * D]."""
    return x.transpose(1, 2).flatten(2)


def from_token_rows(rows: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Undo `token_rows`."""
    batch, heads, tokens, dim = shape
    return rows.reshape(batch, tokens, heads, dim).transpose(1, 2)


def group_channels(name: str, group_size: int, num_heads: int, head_dim: int) -> int:
    """Return the channels of a group: the largest divisor of `group_size` that divides a token of all heads.

    Raises
    ------
    UnsupportedModelError
        If only groups too small to be worth their scale are left.
    """
    size = math.gcd(group_size, num_heads * head_dim)
    if size < LEAST_GROUP:
        raise unsupported(
            name,
            f"{num_heads} heads of {head_dim} channels, which leave groups of {size}",
            f"a token that divides into groups of at least {LEAST_GROUP} channels",
        )
    return size
