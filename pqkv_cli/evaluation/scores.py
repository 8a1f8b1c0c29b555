"""Mean scores of examples, and confidence intervals by resampling them. Knows numbers only."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pqkv_cli.evaluation.sample_log import Sample

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


def compared(baseline: Floats, quantized: Floats) -> dict[str, Any]:
    """Return the means of two lists of scores [N] and their recovery, None where the baseline is zero."""
    if not len(baseline):
        return {"baseline": None, "quantized": None, "recovery": None}
    a, b = float(baseline.mean()), float(quantized.mean())
    return {"baseline": a, "quantized": b, "recovery": b / a if a else None}


def compared_samples(samples: Sequence[Sample], seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Return the comparison of `samples` with the 95 % interval of its recovery; scores are multiplied by `scale`."""
    baseline, quantized = scores(samples)
    return {**compared(scale * baseline, scale * quantized), "ci95": interval95(recovery, baseline, quantized, seed)}


def scores(samples: Iterable[Sample]) -> tuple[Floats, Floats]:
    """Return the scores of the uncompressed and the compressed model, [N] each."""
    rows = [(sample["baseline"]["score"], sample["quantized"]["score"]) for sample in samples]
    both = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def grouped(samples: Sequence[Sample], key: Callable[[Sample], Any]) -> dict[Any, list[Sample]]:
    """Return `samples` by `key`, in the order of the keys."""
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return dict(sorted(groups.items()))


def grid(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return one cell per prompt length and depth, with the number of samples and both means."""
    cells = []
    for (length, depth), own in grouped(samples, lambda s: (s["facts"]["length"], s["facts"]["depth"])).items():
        means = compared(*scores(own))
        cells.append(
            {
                "length": length,
                "depth": depth,
                "samples": len(own),
                "baseline": means["baseline"],
                "quantized": means["quantized"],
            }
        )
    return cells


def recovery(baseline: Floats, quantized: Floats) -> float:
    """Return the mean of the compressed model's scores [N] over that of the uncompressed one's, NaN where that is zero."""
    return float(quantized.mean() / baseline.mean()) if baseline.mean() else float("nan")
