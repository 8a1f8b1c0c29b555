"""Which run, which effective recipe and which artifact a verb works with. Opens no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.calibration.openings import SELF
from pqkv_cli.errors import RunError, UsageError
from pqkv_cli.files import is_temporary
from pqkv_cli.pipeline.hub import located, results_place
from pqkv_cli.pipeline.rundir import RECIPE_FILE, Run, kind_of
from pqkv_cli.pipeline.state import require_done
from pqkv_cli.pipeline.target import Target
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import load_recipe, override

Changes = Mapping[str, object]


def start_run(target: Target, out: Path | None, changes: Changes) -> tuple[Run, Recipe]:
    """Return the run to start or go on with, and its effective recipe; writes nothing.

    `changes` may say that the model lies at another place than `target` says.

    Raises
    ------
    RunError
        If the directory is something else, or a run of another model.
    UsageError
        If nothing can be started from `target`, or a change is not allowed.
    """
    run = target.run if out is None else Run(out)
    if target.recipe is None:
        raise UsageError(f"{target.reference} is an artifact; expected a model, a run or a recipe to start from")
    # A bare model says nothing about settings, so the run keeps the ones it was started with.
    base = run.recipe() if target.has_default_recipe and kind_of(run.path) == "run" else target.recipe
    recipe = override(base, {**changes, "model": changes.get("model") or target.recipe.model})
    if run.path.exists() and kind_of(run.path) != "run" and (run.path.is_file() or any(_foreign_entries(run))):
        raise RunError(f"{run.path} exists and is no run (no {RECIPE_FILE} in it); choose another directory with -o")
    if kind_of(run.path) == "run" and (owner := run.recipe().model) != recipe.model:
        raise RunError(f"{run.path} is a run of the model {owner}, not of {recipe.model}; choose another directory with -o")
    return run, recipe


def continue_run(target: Target, changes: Changes) -> tuple[Run, Recipe]:
    """Return an existing run and its effective recipe with `changes`; writes nothing.

    Raises
    ------
    RunError
        If the run was never started.
    """
    run = started_run(target)
    return run, override(_for_tasks(run.recipe(), changes), changes)


def started_run(target: Target) -> Run:
    """Return the run that `target` leads to.

    Raises
    ------
    RunError
        If it was never started.
    """
    run = target.run
    if kind_of(run.path) != "run":
        raise RunError(f"there is no run in {run.path}; start it with: pqkv calibrate {target.reference}")
    return run


@dataclass(frozen=True, slots=True)
class Source:
    """An artifact to use: its file, the model it belongs to, the settings to use it with, and where results go.

    `is_fetched` says that it lies in the hub's cache, beside which nothing may be written.
    """

    artifact: Path
    recipe: Recipe
    results: Path
    run: Run | None = None
    is_fetched: bool = False


def artifact_source(target: Target, model: str | None, changes: Changes) -> Source:
    """Return the artifact that `target` (a run or an artifact) leads to; `model` says where its model lies now.

    Raises
    ------
    RunError
        If the run has no artifact or an outdated one.
    ArtifactError
        If the hub does not give it.
    UsageError
        If nothing says where the model of a lone artifact lies.
    """
    changes = {**changes, "model": None if model is None else _model_reference(model)}
    target = located(target)
    if target.kind != "artifact" or target.path is None:
        run, recipe = continue_run(target, changes)
        require_done(run, run.recipe(), "export")
        return Source(run.artifact_file, recipe, run.results, run)
    directory = target.path if target.path.is_dir() else target.path.parent
    beside, fetched_results = directory / RECIPE_FILE, results_place(target)
    results = fetched_results or directory / "results"
    if beside.is_file():
        recipe = override(_for_tasks(load_recipe(beside), changes), changes)
        return Source(target.path, recipe, results, is_fetched=fetched_results is not None)
    if model is None:
        raise UsageError(f"there is no {RECIPE_FILE} beside {target.path} to say which model it is for; give it with --model")
    recipe = override(Recipe(name="artifact", model=_model_reference(model)), changes)
    return Source(target.path, recipe, results, is_fetched=fetched_results is not None)


def file_reference(source: str | None) -> str | None:
    """Return `source` with an existing path made absolute, so that a recipe that holds it works from any directory."""
    if source is None:
        return None
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def text_references(sources: Sequence[str] | None) -> list[str] | None:
    """Return the texts named by `sources` as a recipe may hold them: `file_reference`, but ``self`` is never a file."""
    if sources is None:
        return None
    return [source if source == SELF else file_reference(source) or source for source in sources]


def _for_tasks(recipe: Recipe, changes: Changes) -> Recipe:
    """Return `recipe` without the sizes that it gives its own tasks, where `changes` ask for something else.

    Those are all of its sizes where `changes` name none of its tasks, and its number of pass keys where they set a limit: that
    is then the limit of every task.
    """
    named, wanted = changes.get("evaluation.tasks"), recipe.evaluation
    sizes: tuple[str, ...] = ()
    if isinstance(named, list | tuple) and not set(named) & set(wanted.tasks):
        sizes = ("context", "limit", "prompts", "max_new_tokens", "stride")
    elif changes.get("evaluation.limit") is not None:
        sizes = ("prompts",)
    return recipe.model_copy(update={"evaluation": wanted.model_copy(update=dict.fromkeys(sizes))})


def _model_reference(model: str) -> str:
    return file_reference(model) or model


def _foreign_entries(run: Run) -> list[Path]:
    # A run that was killed before its recipe was written holds a lock and half of that recipe, and is ours.
    return [entry for entry in run.path.iterdir() if entry != run.lock_file and not is_temporary(entry)]


def target_artifact(target: Target) -> Path:
    """Return the artifact that `target` is, or that the run it leads to has exported.

    Raises
    ------
    RunError
        If there is no run, or it has no artifact yet.
    ArtifactError
        If the hub does not give it.
    """
    target = located(target)
    if target.kind == "artifact" and target.path is not None:
        return target.path
    run = started_run(target)
    if not run.artifact_file.is_file():
        raise RunError(f"{run.path} has no artifact yet; make it with: pqkv export {run.path}")
    return run.artifact_file
