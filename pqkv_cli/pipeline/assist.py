"""What the other processes of a launcher do while the first one does a stage. They write no run: only the first does."""

from collections.abc import Callable, Mapping

from pqkv_cli.errors import UsageError
from pqkv_cli.pipeline.calibrate import assist_calibrate
from pqkv_cli.pipeline.fit import assist_fit
from pqkv_cli.pipeline.outcome import StageOutcome
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.setting import Stage

_HELP: Mapping[Stage, Callable[[Run, Recipe, Reporter], None]] = {
    "calibrate": assist_calibrate,
    "fit-codebooks": assist_fit,
}


def assist(stage: Stage, run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Do this process's share of `stage`.

    Raises
    ------
    UsageError
        If the stage cannot be shared.
    """
    if stage not in _HELP:
        raise UsageError(f"{stage} works in one process; call it without a launcher")
    _HELP[stage](run, recipe, reporter)
    return StageOutcome(stage, str(run.path), {}, False)
