"""What each stage was made of, and so whether it is done or must be done again. Knows recipes and hashes, not what stages do.

A stage's key is the hash of its inputs, and one of its inputs is the key of the stage before it: a changed input of one
stage invalidates that stage and all that follow, and nothing else.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args

from pqkv_cli.errors import PqkvError, RunError
from pqkv_cli.files import write_text
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.recipe import Recipe, came_later, settings
from pqkv_cli.reporter import Reporter
from pqkv_cli.setting import Stage

STAGES: tuple[Stage, ...] = get_args(Stage)

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage as it was last started: its inputs, whether it came to its end, and a few facts about the outcome."""

    inputs: Mapping[str, Any]
    done: bool = False
    facts: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Hash of the inputs."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def read_records(run: Run) -> dict[str, StageRecord]:
    """Return the records of the stages that were ever started.

    Raises
    ------
    RunError
        If the file is damaged.
    """
    if not run.stages_file.exists():
        return {}
    try:
        data = json.loads(run.stages_file.read_text(encoding="utf-8"))
        return {name: _checked(name, StageRecord(**fields)) for name, fields in data.items()}
    except OSError as error:
        raise RunError(f"{run.stages_file} cannot be read: {error}; fix the rights, then run again") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{run.stages_file} is damaged ({error}); delete it and run the stages again") from error


def _checked(name: str, record: StageRecord) -> StageRecord:
    """Raise TypeError where the fields of `record` are not of their types."""
    if isinstance(record.inputs, dict) and isinstance(record.done, bool) and isinstance(record.facts, dict | None):
        return record
    raise TypeError(f"stage {name} is not described by inputs, done and facts")


def stage_inputs(run: Run, recipe: Recipe, stage: Stage, content: Mapping[str, str]) -> dict[str, Any]:
    """Return the inputs of `stage`: its settings, the given `content` hashes, and the key of the stage before it.

    Raises
    ------
    RunError
        If the stage before it is missing, unfinished or outdated.
    """
    inputs = stage_settings(recipe, stage)
    position = STAGES.index(stage)
    if position:
        before = STAGES[position - 1]
        inputs[before] = require_done(run, recipe, before).key
    return inputs | dict(content)


def require_done(run: Run, recipe: Recipe, stage: Stage) -> StageRecord:
    """Return the record of a stage that was finished with the settings of `recipe`.

    Raises
    ------
    RunError
        If it is missing, unfinished, was done with other settings, or is older than the stage it was made from.
    """
    record = read_records(run).get(stage)
    command = f"pqkv {stage} {run.path}"
    if record is None or not record.done:
        state = "is unfinished" if record else "is missing"
        raise RunError(f"{run.path}: the stage {stage} {state}; run it with: {command}")
    wanted = stage_settings(recipe, stage)
    position = STAGES.index(stage)
    if position:
        before = STAGES[position - 1]
        wanted[before] = require_done(run, recipe, before).key
    # A setting that has its default now may have had another value then.
    if changed := _difference({name: record.inputs.get(name) for name in [*wanted, *sorted(came_later(recipe))]}, wanted):
        raise RunError(f"{run.path}: after {stage} was done, {changed}; bring it up to date with: {command}")
    return record


def is_done(run: Run, stage: Stage, inputs: Mapping[str, Any]) -> bool:
    """Return whether `stage` came to its end with just these inputs."""
    record = read_records(run).get(stage)
    return record is not None and record.done and record.key == StageRecord(inputs).key


def reopen(run: Run, stage: Stage) -> None:
    """Record that a finished `stage` is unfinished after all."""
    records = read_records(run)
    _write(run, records | {stage: StageRecord(records[stage].inputs)})


def begin(run: Run, stage: Stage, inputs: Mapping[str, Any], outputs: Path | None, reporter: Reporter) -> None:
    """Record that `stage` starts; keeps unfinished `outputs` of the same inputs and removes any others, saying why.

    With `outputs` None nothing is removed: the stage replaces its one file in a single step.
    """
    records = read_records(run)
    fresh = StageRecord(inputs)
    old = records.get(stage)
    if old is not None and old.key == fresh.key and not old.done:
        reporter.note(f"{stage}: going on where it stopped")
        return
    if old is not None:
        reporter.note(f"{stage}: doing it again, because {_difference(old.inputs, inputs)}")
    if outputs is not None and outputs.is_dir():
        shutil.rmtree(outputs)
    _write(run, records | {stage: fresh})


def finish(run: Run, stage: Stage, facts: Mapping[str, Any]) -> None:
    """Record that `stage` has come to its end."""
    records = read_records(run)
    _write(run, records | {stage: StageRecord(records[stage].inputs, True, dict(facts))})


def stage_settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Return the settings that `stage` depends on, by dotted name; what lies at a place is an input of its own.

    Settings that came later are left out while they have their default: runs from before them stay done.
    """
    values, unset = recipe.model_dump(mode="json"), came_later(recipe)
    names = (name for name, each in settings(type(recipe)).items() if stage in each.stages and not each.by_content)
    return {name: reduce(getitem, name.split("."), values) for name in names if name not in unset}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changes = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        opaque = name in STAGES or len(str(after)) == 64
        changes.append(f"{name} changed" if opaque else f"{name} changed from {before} to {after}")
    return " and ".join(changes)


def _write(run: Run, records: Mapping[str, StageRecord]) -> None:
    data = {name: {"inputs": dict(r.inputs), "done": r.done, "facts": r.facts} for name, r in records.items()}
    write_text(run.stages_file, json.dumps(data, indent=2) + "\n")


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
