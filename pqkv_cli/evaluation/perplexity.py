"""The perplexity task: held-out text through the uncompressed and the compressed model, token by token comparison."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.bits import cache_bits, codec_bits
from pqkv_cli.evaluation.bootstrap import Floats, interval95
from pqkv_cli.evaluation.contender import CacheFactory, contender
from pqkv_cli.evaluation.divergence import Divergence, diverge, joined
from pqkv_cli.evaluation.outcome import TaskOutcome
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject

Progress = Callable[[int, int], None]


@torch.no_grad()
def perplexity(subject: Subject, settings: EvaluationSettings, on_progress: Progress) -> TaskOutcome:
    """Compare next-token distributions on disjoint windows of the text.

    Raises
    ------
    DataError
        If the text is too short for one window, windows exceed the model's positions, or logits are not finite.
    """
    _check_context(subject, settings)
    windows = token_windows(subject.tokenizer, subject.text, settings.limit, settings.context, settings.seed, at_most=True)
    parts: list[Divergence] = []
    seconds = {"baseline": 0.0, "quantized": 0.0}
    cache: Any = None
    with contender(subject, settings.mode) as new_cache:
        for index, window in enumerate(windows):
            ids = window[None].to(subject.model.device)
            started = time.perf_counter()
            baseline = subject.model(ids, position_ids=_positions(ids, settings), use_cache=False).logits[0]
            between = time.perf_counter()
            quantized, cache = _compressed_logits(subject.model, ids, settings, new_cache)
            seconds["baseline"] += between - started
            seconds["quantized"] += time.perf_counter() - between
            parts.append(diverge(baseline[:-1], quantized[:-1], ids[0, 1:]))
            on_progress(index + 1, len(windows))
    bits = cache_bits(cache) if isinstance(cache, QuantizedCache) else codec_bits(subject.artifact)
    return TaskOutcome(_metrics(parts, settings.seed), bits, int(windows.numel()), {"seconds": seconds})


def _check_context(subject: Subject, settings: EvaluationSettings) -> None:
    positions = getattr(subject.model.config, "max_position_embeddings", None)
    if positions and settings.context > positions:
        raise DataError(
            f"windows of {settings.context} tokens exceed the model's {positions} positions; use --context {positions} or less"
        )


def _positions(ids: torch.Tensor, settings: EvaluationSettings) -> torch.Tensor:
    return (torch.arange(ids.shape[1], device=ids.device) + settings.position_offset)[None]


def _compressed_logits(
    model: Any, ids: torch.Tensor, settings: EvaluationSettings, new_cache: CacheFactory
) -> tuple[torch.Tensor, Any]:
    cache = new_cache()
    positions = _positions(ids, settings)
    size = ids.shape[1] if settings.mode == "all" else settings.chunk_tokens
    logits = []
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, start + size)
        logits.append(model(ids[:, chunk], position_ids=positions[:, chunk], past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits), cache


def _metrics(parts: list[Divergence], seed: int) -> dict[str, Any]:
    tokens = joined(parts)
    losses = [np.array([float(getattr(part, name).mean()) for part in parts]) for name in ("baseline_nll", "quantized_nll")]
    baseline, quantized = losses

    def recovery(a: Floats, b: Floats) -> float:
        return float(np.exp(a.mean() - b.mean()))

    return {
        "kl_bits": {"quantized": float(tokens.kl_bits.mean()), "p99": float(tokens.kl_bits.quantile(0.99))},
        "top1_agreement": {"quantized": float(tokens.agrees.mean())},
        "perplexity": {
            "baseline": float(np.exp(baseline.mean())),
            "quantized": float(np.exp(quantized.mean())),
            "recovery": recovery(baseline, quantized),
            "ci95": interval95(recovery, baseline, quantized, seed),
        },
    }
