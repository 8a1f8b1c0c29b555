"""Windows of text through both models, their distributions compared, and the caches this takes. Knows no tasks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from pqkv_cli.cache.cache import PositionedCache, QuantizedCache
from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.costs import peak_memory
from pqkv_cli.evaluation.prompts import num_positions, shorter
from pqkv_cli.evaluation.record import cache_bits
from pqkv_cli.evaluation.sample_log import Group, Sample
from pqkv_cli.evaluation.scores import Floats, interval95
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.prefix import prefix_ids
from pqkv_cli.reporter import Advance
from pqkv_cli.runtime.attach import attach, simulate_artifact

CacheFactory = Callable[[], PositionedCache]


@contextmanager
def contender(subject: Subject, mode: Mode) -> Iterator[CacheFactory]:
    """Prepare the model for caches of `mode` and yield their factory; the model is restored on exit.

    Without one of these caches the model computes as it did before.
    """
    if mode == "cache":
        with attach(subject.model, subject.artifact, force=subject.force) as attached:
            yield attached.new_cache
    else:
        with simulate_artifact(subject.model, subject.artifact, force=subject.force) as simulation:
            yield simulation.new_cache


_LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per-token comparison of an uncompressed and a compressed model, each [N] fp64 on the CPU.

    Attributes
    ----------
    kl_bits
        KL divergence of the compressed from the uncompressed distribution, bits.
    agrees
        1 where both have the same most likely token.
    top5
        Share of the uncompressed model's five most likely tokens that are among the compressed model's five.
    baseline_nll, quantized_nll
        Negative log-likelihood of the true next token, nats.
    """

    kl_bits: torch.Tensor
    agrees: torch.Tensor
    top5: torch.Tensor
    baseline_nll: torch.Tensor
    quantized_nll: torch.Tensor


def diverge(baseline: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compare logits [N, V] with the true next tokens `targets` [N].

    Raises
    ------
    DataError
        If logits are not finite.
    """
    for name, logits in (("uncompressed", baseline), ("compressed", quantized)):
        if not bool(torch.isfinite(logits).all()):
            raise DataError(f"the {name} model gives logits that are not finite; expected numbers: try --dtype float32")
    log_p, log_q = baseline.float().log_softmax(-1), quantized.float().log_softmax(-1)
    kl_bits = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0) / _LN2
    columns = targets[:, None].to(log_p.device)
    return Divergence(
        kl_bits=kl_bits.double().cpu(),
        agrees=(baseline.argmax(-1) == quantized.argmax(-1)).double().cpu(),
        top5=_shared_best(baseline, quantized, 5).cpu(),
        baseline_nll=-log_p.gather(-1, columns)[:, 0].double().cpu(),
        quantized_nll=-log_q.gather(-1, columns)[:, 0].double().cpu(),
    )


def _shared_best(baseline: torch.Tensor, quantized: torch.Tensor, count: int) -> torch.Tensor:
    count = min(count, baseline.shape[-1])
    first, second = baseline.topk(count).indices, quantized.topk(count).indices
    return (first[..., None] == second[..., None, :]).any(-1).double().mean(-1)


def joined(parts: list[Divergence]) -> Divergence:
    """Return all tokens of `parts` in one."""
    return Divergence(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Divergence)))


_FIRST_SPAN = 128
_TAILS = {"p99": 0.99, "p99_9": 0.999}


@dataclass(frozen=True, slots=True)
class Compared:
    """One window: how far both models are apart, what the compressed one's cache held, seconds of each side."""

    divergence: Divergence
    cache: Any
    seconds: dict[str, float]


def measured(subject: Subject, count: int, measure: Callable[[int], Compared], on_progress: Advance) -> list[Group]:
    """Return one group per window, measured now or found in the subject's log; windows that fail are kept as such."""
    groups = []
    for index in range(count):
        name = str(index)
        group = subject.log.get(name)
        if group is None:
            group = subject.log.add(name, *_measure(subject, name, index, measure))
        groups.append(group)
        on_progress(index + 1, count)
    return groups


def _measure(
    subject: Subject, name: str, index: int, measure: Callable[[int], Compared]
) -> tuple[list[Sample], dict[str, Any]]:
    try:
        with peak_memory(subject.model.device) as peak:
            done = measure(index)
    except DataError as error:  # logits that are not finite
        return [{"name": name, "failed": str(error)}], {"bits": None, "seconds": None, "peak_bytes": None}
    held = asdict(cache_bits(done.cache)) if isinstance(done.cache, QuantizedCache) else None
    rows = {f.name: [float(f"{x:.9g}") for x in getattr(done.divergence, f.name).tolist()] for f in fields(Divergence)}
    return [{"name": name, **rows}], {"bits": held, "seconds": done.seconds, "peak_bytes": peak.num_bytes}


def logits_of(model: Any, ids: torch.Tensor, settings: EvaluationSettings, new_cache: CacheFactory) -> tuple[torch.Tensor, Any]:
    """Return the compressed model's logits [T, V] of a window `ids` [1, T], and its cache."""
    cache = new_cache()
    positions = positions_of(ids, settings)
    size = ids.shape[1] if settings.mode == "all" else settings.chunk_tokens
    logits = []
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, start + size)
        logits.append(
            model(ids[:, chunk], position_ids=positions[:, chunk], **cache_argument(model, cache), use_cache=True).logits[0]
        )
    return torch.cat(logits), cache


def windows_of(subject: Subject, settings: EvaluationSettings) -> torch.Tensor:
    """Return the windows [windows, context] of the subject's text that are read.

    Raises
    ------
    DataError
        If the text is too short for one.
    """
    limit, context = settings.limit, settings.context
    return token_windows(subject.tokenizer, subject.text, limit, context, settings.seed, at_most=True, stride=settings.stride)


def scored(settings: EvaluationSettings) -> slice:
    """Return which of a window's predictions count: all, or with a stride those of its last tokens."""
    return slice(-settings.stride if settings.stride else None, None)


def positions_of(ids: torch.Tensor, settings: EvaluationSettings) -> torch.Tensor:
    """Return the positions [1, T] of a window."""
    return (torch.arange(ids.shape[1], device=ids.device) + settings.position_offset)[None]


def timed(device: torch.device) -> float:
    """Return the time when all that was asked of `device` is done, seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_context(subject: Subject, num_tokens: int) -> None:
    """Refuse windows that the model cannot hold.

    Raises
    ------
    DataError
        If a window of `num_tokens` exceeds the model's positions.
    """
    positions = num_positions(subject.model)
    if positions and num_tokens > positions:
        least = len(prefix_ids(subject.tokenizer)) + 1
        raise DataError(f"windows of {num_tokens} tokens exceed the model's {positions} positions; {shorter(positions, least)}")


def table(groups: Sequence[Group]) -> dict[str, Floats]:
    """Return every number of the windows that did not fail, [windows, tokens] each.

    Raises
    ------
    DataError
        If all of them failed.
    """
    good = [sample for group in groups for sample in group.samples if "failed" not in sample]
    if not good:
        raise DataError(f"no window could be measured: {groups[0].samples[0]['failed']}")
    return {f.name: np.array([sample[f.name] for sample in good], dtype=np.float64) for f in fields(Divergence)}


def failures(groups: Sequence[Group]) -> tuple[str, ...]:
    """Return the windows that failed, with the reason."""
    return tuple(f"window {s['name']}: {s['failed']}" for group in groups for s in group.samples if "failed" in s)


def divergence_metrics(rows: dict[str, Floats], seed: int) -> dict[str, Any]:
    """Return KL divergence, top-1 and top-5 agreement over all tokens, with intervals over windows."""

    def mean(unused: Floats, own: Floats) -> float:
        return float(own.mean())

    def one(name: str) -> dict[str, Any]:
        per_window = rows[name].mean(axis=1)
        return {"quantized": float(rows[name].mean()), "ci95": interval95(mean, per_window, per_window, seed)}

    tails = {name: float(np.quantile(rows["kl_bits"], share)) for name, share in _TAILS.items()}
    kl_bits = one("kl_bits") | tails
    return {"kl_bits": kl_bits, "top1_agreement": one("agrees"), "top5_agreement": one("top5")}


def spans(length: int) -> list[tuple[int, int]]:
    """Return the ranges of positions that results are given for: up to 128, then doubling."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(_FIRST_SPAN, 2 * edges[-1])))
    return list(zip(edges, edges[1:], strict=False))


def by_context(rows: dict[str, Floats], num_before: int = 0) -> list[dict[str, Any]]:
    """Return the metrics by how many tokens a prediction looks back at; the first of `rows` at one more than `num_before`."""
    cells = []
    for start, stop in spans(num_before + rows["kl_bits"].shape[1]):
        if stop <= num_before:
            continue
        first = max(start, num_before)
        part = {name: values[:, first - num_before : stop - num_before] for name, values in rows.items()}
        cells.append(
            {
                "from": first + 1,
                "to": stop,
                "kl_bits": float(part["kl_bits"].mean()),
                "p99": float(np.quantile(part["kl_bits"], 0.99)),
                "top1_agreement": float(part["agrees"].mean()),
                "top5_agreement": float(part["top5"].mean()),
                "baseline_perplexity": float(np.exp(part["baseline_nll"].mean())),
                "quantized_perplexity": float(np.exp(part["quantized_nll"].mean())),
            }
        )
    return cells


def cost(groups: Sequence[Group]) -> dict[str, Any]:
    """Return seconds of each side and the peak bytes of both together."""
    known = [group.facts for group in groups if group.facts["seconds"]]
    peaks = [facts["peak_bytes"] for facts in known if facts["peak_bytes"] is not None]
    seconds = {side: sum(facts["seconds"][side] for facts in known) for side in ("baseline", "quantized")}
    return {"seconds": seconds, "peak_bytes": max(peaks) if peaks else None}
