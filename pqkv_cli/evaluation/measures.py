"""Which metrics our own tasks have, so that a gate on something else is found before anything is measured. Runs nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pqkv_cli.errors import did_you_mean
from pqkv_cli.evaluation.longbench_data import tasks_in
from pqkv_cli.gates import ANY_TASK, Gate

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
