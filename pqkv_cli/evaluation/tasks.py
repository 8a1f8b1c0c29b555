"""All tasks by name, ours and those of lm-evaluation-harness, how one becomes a result record, and what ours measure."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pqkv_cli.errors import did_you_mean
from pqkv_cli.evaluation.harness import harness, require_harness_task
from pqkv_cli.evaluation.kld import kld, kld_generated
from pqkv_cli.evaluation.lines import check_line_rows, lines
from pqkv_cli.evaluation.longbench import longbench
from pqkv_cli.evaluation.longbench_data import load_longbench, tasks_in
from pqkv_cli.evaluation.needle import needle
from pqkv_cli.evaluation.passkey import passkey
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.record import OURS, SCHEMA, TaskOutcome, circumstances, model_facts
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.gates import ANY_TASK, Gate
from pqkv_cli.reporter import Advance

Task = Callable[[Subject, EvaluationSettings, Advance], TaskOutcome]
TASKS: Mapping[str, Task] = {
    "perplexity": perplexity,
    "passkey": passkey,
    "needle": needle,
    "lines": lines,
    "kld": kld,
    "kld_generated": kld_generated,
    "longbench": longbench,
}
_TEXT_TASKS = frozenset({"perplexity", "passkey", "needle", "kld", "kld_generated"})


def reads_text(name: str) -> bool:
    """Return whether the task needs held-out text; others make their prompts or read rows."""
    return name in _TEXT_TASKS


def require_tasks(names: Sequence[str], data: Path | None) -> None:
    """Find out before anything is opened whether there are such tasks; `data` may hold definitions for the harness.

    Raises
    ------
    UsageError
        If there is none of a name, with the nearest.
    """
    for name in names:
        if name not in TASKS:
            require_harness_task(name, list(TASKS), data)


def check_rows(names: Sequence[str], data: Path | None) -> None:
    """Read the rows at `data` that tasks of ours will ask, so that a bad one shows before a model is loaded.

    Raises
    ------
    DataError
        If a row is not as its task needs it; the file and the row are named.
    """
    if data is not None and "longbench" in names:
        load_longbench(data, tasks_in(data), None)
    if data is not None and "lines" in names:
        check_line_rows(data)


def run_task(name: str, subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> dict[str, Any]:
    """Run one task in one mode and return its result record (``pqkv.result/1``).

    Raises
    ------
    UsageError
        If there is no such task.
    """
    require_tasks([name], subject.data)
    task = TASKS.get(name) or partial(harness, name)
    return _record(name, subject, settings, task(subject, settings, on_progress))


def _record(name: str, subject: Subject, settings: EvaluationSettings, outcome: TaskOutcome) -> dict[str, Any]:
    artifact = subject.artifact
    return {
        "schema": SCHEMA,
        "task": name,
        "mode": outcome.mode or settings.mode,
        "method": OURS,
        "status": "incomplete" if outcome.failed else "complete",
        "model": model_facts(subject),
        "artifact_sha256": artifact.sha256,
        "bits_per_channel": outcome.bits.document(),
        "table_bytes": artifact.table_bytes,
        "cache_bytes": _cache_bytes(outcome),
        "headline": list(outcome.headline),
        "metrics": dict(outcome.metrics),
        "cost": dict(outcome.cost),
        **circumstances(subject, settings, outcome.num_tokens),
        **({"failed_samples": list(outcome.failed)} if outcome.failed else {}),
        **({"notes": dict(outcome.notes)} if outcome.notes else {}),
    }


def _cache_bytes(outcome: TaskOutcome) -> dict[str, int]:
    counted = {"num_tokens": outcome.bits.num_tokens, "num_read_as_codes": outcome.bits.num_read_as_codes}
    return {**outcome.bits.cache_bytes, **{name: count for name, count in counted.items() if count is not None}}


# Which metrics our own tasks have, so that a gate on something else is found before anything is measured.
_DIVERGENCE = ("kl_bits", "top1_agreement", "top5_agreement")
_METRICS: Mapping[str, tuple[str, ...]] = {
    "perplexity": (*_DIVERGENCE, "perplexity"),
    "kld": _DIVERGENCE,
    "kld_generated": _DIVERGENCE,
    "passkey": ("accuracy",),
    "needle": ("recall",),
    "lines": ("accuracy",),
}
_WITHOUT_RECOVERY = frozenset({"kld", "kld_generated"})
# Numbers that every record has beside its metrics.
_OF_RECORDS = frozenset({"bits_per_channel", "table_bytes", "cache_bytes", "cost", "calibration_overlap", "settings", "notes"})


def unmeasured(gate: Gate, tasks: Sequence[str], data: Path | None) -> str | None:
    """Return why none of `tasks` on the rows at `data` has what `gate` judges; None where one has or may have it.

    Of tasks of lm-evaluation-harness nothing is known before they have run.
    """
    name = gate.path.partition(".")[0].partition("@")[0]
    concerned = [task for task in tasks if gate.task in (ANY_TASK, task)]
    reasons = []
    for task in concerned:
        names = _names(task, data)
        if names is None or name in names or name in _OF_RECORDS:
            return None
        reasons.append(f"{task} measures {', '.join(names)}{did_you_mean(name, names)}")
    return "; ".join(reasons) or None


def _names(task: str, data: Path | None) -> tuple[str, ...] | None:
    if task == "longbench":
        names: tuple[str, ...] = ("average", *tasks_in(data), "samples")
    elif task in _METRICS:
        names = _METRICS[task]
    else:
        return None
    return names if task in _WITHOUT_RECOVERY else (*names, "recovery")
