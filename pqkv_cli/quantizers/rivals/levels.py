"""Non-uniform levels on a line: the nearest one, and the best ones for a density or for samples. Knows numbers only."""

import torch

from pqkv_cli.quantizers.kmeans import kmeans

_GRID = 20001
_MOST_STEPS = 2000


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index (uint8) of the nearest of the rising `levels` [K] for every entry of `x`."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def fitted_levels(x: torch.Tensor, weights: torch.Tensor, num_levels: int, generator: torch.Generator) -> torch.Tensor:
    """Return the rising levels [K] fp32 that k-means finds for entries `x` [N] with `weights` [N]."""
    result = kmeans(x[None, :, None], num_levels, weights=weights[None], iterations=50, generator=generator)
    return result.centroids[0, :, 0].sort().values


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
