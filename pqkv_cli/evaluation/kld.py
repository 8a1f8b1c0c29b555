"""How far the compressed model's distributions are from the uncompressed one's: over text, or over its own continuation.

Over text it is the perplexity task without perplexity. Over a continuation (`kld_generated`) the uncompressed model writes on,
token by token, sampled at temperature 1; the compressed model is shown the same tokens one at a time and never sees its own, so
what is measured is how errors in the cache add up over generated tokens, not how one other word changes a story.
"""

import numpy as np
import torch

from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.prompts import num_positions, shorter
from pqkv_cli.evaluation.record import TaskOutcome, fullest_bits
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.text_windows import (
    CacheFactory,
    Compared,
    by_context,
    contender,
    cost,
    diverge,
    divergence_metrics,
    failures,
    joined,
    measured,
    table,
    timed,
)
from pqkv_cli.hf.cache_layers import uncompressed_cache
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.prefix import prefix_ids
from pqkv_cli.reporter import Advance

DEFAULT_NEW_TOKENS = 1024
DEFAULT_CONTINUATIONS = 4


def kld(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Compare next-token distributions on disjoint windows of the text, by context length.

    Raises
    ------
    DataError
        As the perplexity task.
    """
    outcome = perplexity(subject, settings, on_progress)
    metrics = {name: value for name, value in outcome.metrics.items() if name != "perplexity"}
    return TaskOutcome(metrics, outcome.bits, outcome.num_tokens, outcome.cost, ("kl_bits",), outcome.failed)


@torch.no_grad()
def kld_generated(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Compare next-token distributions along the uncompressed model's own continuations, by step.

    Raises
    ------
    DataError
        If the text is too short, or prompt and continuation exceed the model's positions.
    """
    steps, positions = settings.max_new_tokens or DEFAULT_NEW_TOKENS, num_positions(subject.model)
    if positions is not None and settings.context + steps > positions:
        room = positions - settings.context
        way = f"use a smaller --context or --max-new-tokens {room}"
        if room < 1:
            way = shorter(positions - steps, len(prefix_ids(subject.tokenizer)) + 1)
            if positions - steps < 2 < positions:
                way = f"use --context {positions // 2} --max-new-tokens {positions - positions // 2}"
        raise DataError(
            f"prompts of {settings.context} tokens and {steps} tokens of continuation exceed the model's "
            f"{positions} positions; {way}"
        )
    limit = settings.limit or DEFAULT_CONTINUATIONS
    prompts = token_windows(subject.tokenizer, subject.text, limit, settings.context, settings.seed, at_most=True)
    with contender(subject, settings.mode) as new_cache:

        def measure(index: int) -> Compared:
            generator = torch.Generator(subject.model.device).manual_seed(settings.seed + index)
            return _continue(subject, prompts[index][None].to(subject.model.device), steps, new_cache, generator)

        groups = measured(subject, len(prompts), measure, on_progress)
    rows = table(groups)
    steps_apart = [{**cell, "quantity": "step"} for cell in by_context(rows)]
    metrics = {**divergence_metrics(rows, settings.seed), "by_step": steps_apart}
    metrics["kl_bits"]["growth"] = _growth(rows["kl_bits"])
    bits = fullest_bits([group.facts["bits"] for group in groups], subject.artifact)
    notes = {"new_tokens": steps, "temperature": 1.0}
    return TaskOutcome(metrics, bits, len(prompts) * steps, cost(groups), ("kl_bits",), failures(groups), notes)


def _continue(
    subject: Subject, prompt: torch.Tensor, steps: int, new_cache: CacheFactory, generator: torch.Generator
) -> Compared:
    model = subject.model
    caches = {"baseline": uncompressed_cache(model.config), "quantized": new_cache()}
    seconds = dict.fromkeys(caches, 0.0)
    parts, ids = [], prompt
    for _ in range(steps):
        logits = {}
        for side, cache in caches.items():
            started = timed(model.device)
            logits[side] = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits[:, -1]
            seconds[side] += timed(model.device) - started
        # A broken uncompressed model has no next token; diverge() names it.
        best = logits["baseline"].float().nan_to_num(0.0, 0.0, 0.0)
        ids = torch.multinomial(best.softmax(-1), 1, generator=generator)
        parts.append(diverge(logits["baseline"], logits["quantized"], ids[0]))
    return Compared(joined(parts), caches["quantized"], seconds)


def _growth(kl_bits: np.ndarray) -> float | None:
    """Return how many times larger the last quarter's mean KL is than the first quarter's; `kl_bits` [windows, steps]."""
    quarter = max(1, kl_bits.shape[1] // 4)
    first, last = float(kl_bits[:, :quarter].mean()), float(kl_bits[:, -quarter:].mean())
    return last / first if first else None
