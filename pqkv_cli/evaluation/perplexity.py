"""The perplexity task: held-out text through the uncompressed and the compressed model, token by token comparison."""

from typing import Any

import numpy as np
import torch

from pqkv_cli.evaluation.record import TaskOutcome, fullest_bits
from pqkv_cli.evaluation.scores import Floats, interval95
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.text_windows import (
    Compared,
    by_context,
    check_context,
    contender,
    cost,
    diverge,
    divergence_metrics,
    failures,
    logits_of,
    measured,
    positions_of,
    scored,
    table,
    timed,
    windows_of,
)
from pqkv_cli.reporter import Advance


@torch.no_grad()
def perplexity(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Compare next-token distributions on windows of the text, disjoint or, with a stride, overlapping.

    Raises
    ------
    DataError
        If the text is too short for one window, windows exceed the model's positions, or no logits are finite.
    """
    check_context(subject, settings.context)
    windows = windows_of(subject, settings)
    model, counted = subject.model, scored(settings)
    with contender(subject, settings.mode) as new_cache:

        def measure(index: int) -> Compared:
            ids = windows[index][None].to(model.device)
            started = timed(model.device)
            baseline = model(ids, position_ids=positions_of(ids, settings), use_cache=False).logits[0]
            between = timed(model.device)
            quantized, cache = logits_of(model, ids, settings, new_cache)
            seconds = {"baseline": between - started, "quantized": timed(model.device) - between}
            return Compared(diverge(baseline[:-1][counted], quantized[:-1][counted], ids[0, 1:][counted]), cache, seconds)

        groups = measured(subject, len(windows), measure, on_progress)
    rows = table(groups)
    metrics = divergence_metrics(rows, settings.seed)
    metrics |= {
        "perplexity": perplexity_metric(rows, settings.seed),
        "by_context": by_context(rows, windows.shape[1] - 1 - rows["kl_bits"].shape[1]),
    }
    bits = fullest_bits([group.facts["bits"] for group in groups], subject.artifact)
    return TaskOutcome(metrics, bits, int(windows.numel()), cost(groups), ("kl_bits", "perplexity"), failures(groups))


def perplexity_metric(rows: dict[str, Floats], seed: int) -> dict[str, Any]:
    """Return both perplexities and their ratio, with an interval over windows."""
    baseline, quantized = (rows[name].mean(axis=1) for name in ("baseline_nll", "quantized_nll"))

    def recovery(a: Floats, b: Floats) -> float:
        return float(np.exp(a.mean() - b.mean()))

    return {
        "baseline": float(np.exp(baseline.mean())),
        "quantized": float(np.exp(quantized.mean())),
        "recovery": recovery(baseline, quantized),
        "ci95": interval95(recovery, baseline, quantized, seed),
    }
