"""Confidence intervals by resampling examples. Knows numbers only."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def interval95(
    statistic: Callable[[Floats, Floats], float], baseline: Floats, quantized: Floats, seed: int, resamples: int = 1000
) -> list[float] | None:
    """Return the 95 % percentile bootstrap interval of a paired statistic over examples, [N] each (Efron 1979).

    None where there are fewer than two examples, or where the statistic is undefined on a resample.
    """
    if len(baseline) < 2:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = rng.integers(0, len(baseline), len(baseline))
        values.append(statistic(baseline[rows], quantized[rows]))
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
