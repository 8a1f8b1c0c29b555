"""Tasks of lm-evaluation-harness by name: its prompts, data and metrics, our two models. Needs the extra `eval`.

The harness is the engine: nothing of a task is repeated here. What is added is the comparison: both models on the same
requests, recovery per metric, and what was quantized while it was scored.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pqkv_cli.errors import DataError, UsageError, did_you_mean, first_line
from pqkv_cli.evaluation.longbench_metrics import INSTALL
from pqkv_cli.evaluation.qa_runner import answering_cost
from pqkv_cli.evaluation.record import TaskOutcome, fullest_bits
from pqkv_cli.evaluation.scores import Floats, interval95
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.reporter import Advance

Results = Mapping[str, Any]
Key = tuple[str, str, str]  # task, metric, filter


def require_harness_task(name: str, own: Sequence[str], data: Path | None) -> None:
    """Find out, without loading the harness, whether it may know the task `name`; `own` are ours, `data` may hold more.

    Raises
    ------
    UsageError
        If it cannot, or is not installed.
    """
    nearest = f"there is no task {name!r}{did_you_mean(name, own)}; known are {', '.join(own)}"
    if _mentions(data, name):
        return
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UsageError(f"{nearest}, and the tasks of lm-evaluation-harness after: {INSTALL}")
    if not _mentions(Path(spec.origin).parent / "tasks", name):
        raise UsageError(f"{nearest}, and the tasks of lm-evaluation-harness, which has none of this name")


def harness(name: str, subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Run the harness's task or group `name` with and without compression.

    Raises
    ------
    DataError
        If the task's data cannot be had.
    UsageError
        If there is no such task.
    """
    from pqkv_cli.evaluation.harness_model import HarnessModel

    manager, done = _manager(name, subject.data), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, max(done, 1))

    results, models = {}, {}
    with _quiet():
        for side, quantizes in (("baseline", False), ("quantized", True)):
            models[side] = HarnessModel(subject, settings, advance, quantizes=quantizes)
            results[side] = _evaluated(name, models[side], manager, settings)
    modes = models["quantized"].modes
    metrics, headline = _compared(results["baseline"], results["quantized"], settings.seed)
    failed = [f"{metric}: not a finite number" for metric, found in metrics.items() if found["quantized"] is None]
    failed = [*dict.fromkeys([*models["baseline"].failed, *models["quantized"].failed]), *failed]
    notes = {"engine": f"lm-evaluation-harness {_version()}", "modes": dict(modes), "versions": results["baseline"]["versions"]}
    samples = results["baseline"].get("n-samples", {})
    notes |= _cut(name, models["baseline"])
    notes["samples"] = {task: count.get("effective") for task, count in samples.items()}
    mode = "all" if set(modes.values()) == {"all"} else settings.mode
    total = sum(count or 0 for count in notes["samples"].values())
    bits = fullest_bits([part["bits"] for part in models["quantized"].parts], subject.artifact)
    return TaskOutcome(metrics, bits, total, _cost(models), headline, tuple(failed), notes, mode)


def _cut(name: str, model: Any) -> dict[str, int]:
    num_cut = sum(part["num_cut"] for part in model.parts)
    if num_cut:
        warnings.warn(
            f"{num_cut} prompts of {name} are longer than the model's {model.max_length} positions allow; they lost their "
            "beginning, as lm-evaluation-harness does it",
            stacklevel=3,
        )
    return {"prompts_cut_at_the_left": num_cut}


def _cost(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record's ``cost``: of answers that were generated in detail, of all requests seconds and peak bytes."""
    parts = {side: model.parts for side, model in models.items()}
    generated = {side: [batch for part in own for batch in part["generated"]] for side, own in parts.items()}
    cost: dict[str, Any] = answering_cost(generated) if all(generated.values()) else {}
    cost["batch_size"] = max((part["batch_size"] for part in parts["quantized"]), default=0) or None
    cost["seconds"] = {side: sum(part["seconds"] for part in own) for side, own in parts.items()}
    peaks = {side: [part["peak_bytes"] for part in own if part["peak_bytes"] is not None] for side, own in parts.items()}
    cost["peak_bytes"] = {side: max(own) if own else None for side, own in peaks.items()}
    return cost


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from warning that it was given a model instead of a name: it was."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mentions(place: Path | None, name: str) -> bool:
    if place is None or not place.is_dir():
        return False
    wanted = name.encode()
    files = (path for pattern in ("*.yaml", "*.yml", "*.py") for path in place.rglob(pattern))
    return any(wanted in path.read_bytes() for path in files)


def _manager(name: str, data: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if _mentions(data, name):
        return TaskManager(include_path=str(data), include_defaults=False)
    return TaskManager()


def _evaluated(name: str, model: Any, manager: Any, settings: EvaluationSettings) -> Results:
    from lm_eval import simple_evaluate

    if name not in manager.all_tasks:
        nearest = did_you_mean(name, manager.all_tasks)
        raise UsageError(f"lm-evaluation-harness has no task {name!r}{nearest}; its list: lm_eval ls tasks")
    try:
        found = simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (OSError, ImportError, ConnectionError) as error:
        raise DataError(
            f"the harness's task {name} cannot be run ({type(error).__name__}: {first_line(error)}); its data come from the "
            "hub: go online once, or give a directory with your own tasks with --data"
        ) from error
    assert found is not None  # only other processes of a distributed run get None
    results: Results = found
    return results


def _compared(baseline: Results, quantized: Results, seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    keys = list(_keys(baseline))
    several_tasks = len({task for task, _, _ in keys}) > 1
    several_filters = {(task, metric) for task, metric, _ in keys if sum(k[:2] == (task, metric) for k in keys) > 1}
    metrics, headline, groups = {}, [], set(baseline.get("groups", {}))
    for task, metric, kind in keys:
        name = f"{task}.{metric}" if several_tasks else metric
        name += f".{kind}" if (task, metric) in several_filters else ""
        sides = [_number(results["results"][task].get(f"{metric},{kind}")) for results in (baseline, quantized)]
        higher = baseline.get("higher_is_better", {}).get(task, {}).get(metric, True) is not False
        metrics[name] = _metric(sides[0], sides[1], higher=higher)
        metrics[name]["ci95"] = _interval(baseline, quantized, (task, metric, kind), higher, seed)
        if not groups or task in groups:
            headline.append(name)
    return metrics, tuple(headline)


def _keys(results: Results) -> Iterator[Key]:
    for task, found in results["results"].items():
        for key in found:
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and _number(found[key]) is not None:
                yield task, metric, kind


def _metric(baseline: float | None, quantized: float | None, *, higher: bool) -> dict[str, Any]:
    above, below = (quantized, baseline) if higher else (baseline, quantized)
    recovery = above / below if above is not None and below else None
    return {"baseline": baseline, "quantized": quantized, "recovery": recovery}


def _interval(baseline: Results, quantized: Results, key: Key, higher: bool, seed: int) -> list[float] | None:
    """Return the interval of the recovery where the metric is a mean over samples, as most are; None elsewhere."""
    first, second = _per_sample(baseline, key), _per_sample(quantized, key)
    if first is None or second is None or len(first) != len(second):
        return None
    reported = baseline["results"][key[0]][f"{key[1]},{key[2]}"]
    if not np.isclose(first.mean(), reported):
        return None

    def recovery(a: Floats, b: Floats) -> float:
        above, below = (b.mean(), a.mean()) if higher else (a.mean(), b.mean())
        return float(above / below) if below else float("nan")

    return interval95(recovery, first, second, seed)


def _per_sample(results: Results, key: Key) -> Floats | None:
    task, metric, kind = key
    own = [s for s in results.get("samples", {}).get(task, ()) if s.get("filter", "none") == kind]
    values = [_number(s.get(metric)) for s in sorted(own, key=lambda s: int(s["doc_id"]))]
    return np.array(values, dtype=np.float64) if values and None not in values else None


def _number(value: object) -> float | None:
    if isinstance(value, bool | int | float | np.number) and np.isfinite(float(value)):
        return float(value)
    return None


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
