"""Scores of both models put side by side: means, recovery, intervals, grids. Knows samples, not how they were scored."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pqkv_cli.evaluation.bootstrap import Floats, interval95
from pqkv_cli.evaluation.samples import Sample


def compared(baseline: Floats, quantized: Floats) -> dict[str, Any]:
    """Return the means of two lists of scores [N] and their recovery, None where the baseline is zero."""
    if not len(baseline):
        return {"baseline": None, "quantized": None, "recovery": None}
    a, b = float(baseline.mean()), float(quantized.mean())
    return {"baseline": a, "quantized": b, "recovery": b / a if a else None}


def compared_samples(samples: Sequence[Sample], seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Return the comparison of `samples` with the 95 % interval of its recovery; scores are multiplied by `scale`."""
    baseline, quantized = scores(samples)
    return {**compared(scale * baseline, scale * quantized), "ci95": interval95(_recovery, baseline, quantized, seed)}


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


def _recovery(baseline: Floats, quantized: Floats) -> float:
    return float(quantized.mean() / baseline.mean()) if baseline.mean() else float("nan")
