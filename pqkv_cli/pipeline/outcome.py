"""What a stage returns to whoever asked for it, and the common way through a stage."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.errors import PqkvError
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import begin, finish, is_done, read_records, reopen
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.setting import Stage

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """One finished stage: where its files lie, facts about them, and whether it was done before."""

    stage: Stage
    directory: str
    facts: Facts
    was_done: bool


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a stage is about to do.

    Attributes
    ----------
    inputs
        Everything its outcome depends on.
    directory
        Where its files go.
    prepare
        Opens what the work needs and finds what is wrong with it, before anything is written; returns the work itself.
    keeps_old_files
        The work replaces a finished file in one step, so an older one stays until then.
    read
        Reads what a finished stage left; raises `PqkvError` where that is damaged: the stage then goes on from what is left.
    """

    stage: Stage
    inputs: Facts
    directory: Path
    prepare: Callable[[], Callable[[], Facts]]
    keeps_old_files: bool = False
    read: Callable[[], object] | None = None


def do_stage(run: Run, recipe: Recipe, work: StageWork, reporter: Reporter) -> StageOutcome:
    """Do `work` unless it is done already; the recipe becomes the effective one as soon as it is known to be good."""
    # Whoever deleted a stage's files wants it done again.
    was_done = work.directory.is_dir() and is_done(run, work.stage, work.inputs) and _is_whole(run, work, reporter)
    act = None if was_done else work.prepare()
    run.save_recipe(recipe)
    if act is not None:
        begin(run, work.stage, work.inputs, None if work.keeps_old_files else work.directory, reporter)
        started = time.monotonic()
        facts = act()
        finish(run, work.stage, {**facts, "seconds": round(time.monotonic() - started, 1)})
    return StageOutcome(work.stage, str(work.directory), read_records(run)[work.stage].facts or {}, was_done)


def _is_whole(run: Run, work: StageWork, reporter: Reporter) -> bool:
    """Return whether what a finished stage left can be read, and say so; where it cannot, the stage counts as unfinished."""
    try:
        if work.read is not None:
            work.read()
    except PqkvError as error:
        reporter.note(f"{work.stage}: was done with these settings, but {error}")
        reopen(run, work.stage)
        return False
    reporter.note(f"{work.stage}: already done with these settings")
    return True
