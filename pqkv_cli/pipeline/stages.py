"""The stages by name, and all of them in a row. One process at a time, or those that a launcher started together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.errors import UsageError
from pqkv_cli.pipeline.calibrate import assist_calibrate, calibrate
from pqkv_cli.pipeline.evaluate import evaluate
from pqkv_cli.pipeline.export import export
from pqkv_cli.pipeline.fit import assist_fit, fit
from pqkv_cli.pipeline.generate import generate_from
from pqkv_cli.pipeline.lock import locked
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.start import Source
from pqkv_cli.pipeline.state import StageOutcome
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.generate import Generation
from pqkv_cli.setting import Stage

_STAGES: Mapping[Stage, Callable[[Run, Recipe, Reporter], StageOutcome]] = {
    "calibrate": calibrate,
    "fit-codebooks": fit,
    "export": export,
}
# What the other processes of a launcher do meanwhile. They write no run: only the first one does.
_WORKERS: Mapping[Stage, Callable[[Run, Recipe, Reporter], None]] = {
    "calibrate": assist_calibrate,
    "fit-codebooks": assist_fit,
}


@dataclass(frozen=True, slots=True)
class Whole:
    """What the whole chain came to: its stages, the result records, one continuation."""

    stages: tuple[StageOutcome, ...]
    records: tuple[dict[str, Any], ...]
    generation: Generation


def run_stage(stage: Stage, run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Do one stage of `run`.

    Raises
    ------
    PqkvError
        Whatever the stage raises; RunError if another process works on the run, UsageError if several processes were started
        and the stage cannot be shared.
    """
    if not current_ranks().is_first:
        return _work_beside(stage, run, recipe, reporter)
    with locked(run):
        return _STAGES[stage](run, recipe, reporter)


def run_all(run: Run, recipe: Recipe, reporter: Reporter) -> Whole:
    """Do every stage that is not done, evaluate, and generate one continuation.

    Raises
    ------
    PqkvError
        Whatever a stage raises; RunError if another process works on the run.
    """
    with locked(run):
        stages = tuple(_STAGES[stage](run, recipe, reporter) for stage in _STAGES)
        records = evaluate(run, recipe, reporter)
        source = Source(run.artifact_file, recipe, run.results, run)
        return Whole(stages, tuple(records), generate_from(source, recipe.generation.prompt, reporter))


def _work_beside(stage: Stage, run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Do this process's share of `stage`, which is not the first one's."""
    if stage not in _WORKERS:
        raise UsageError(f"{stage} works in one process; call it without a launcher")
    _WORKERS[stage](run, recipe, reporter)
    return StageOutcome(stage, str(run.path), {}, False)
