"""What a word of the command line means: a model, a run, an artifact, a recipe or a repository of the hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.artifact.schema import ARTIFACT_FILE
from pqkv_cli.errors import ModelError, RunError, UsageError, did_you_mean
from pqkv_cli.models.gguf import only_gguf
from pqkv_cli.models.resolve import check_no_adapter
from pqkv_cli.pipeline.rundir import MODEL_FILE, RECIPE_FILE, PathKind, Run, kind_of, runs_under
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import load_recipe, named_recipe, recipe_names

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository ``org/name`` and, where one is asked for, its revision: a branch, a tag or a full commit."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Return what ``org/name`` or ``org/name@revision`` names, None where `text` is neither."""
    found = _NAME.fullmatch(text)
    return None if found is None else HubName(found["repository"], found["revision"])


RUNS = Path("runs")
_EXPECTED = f"a model ({MODEL_FILE}), a run ({RECIPE_FILE}) or an artifact ({ARTIFACT_FILE})"


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved reference: `path` for what lies on disk, `recipe` for what a pipeline can start from.

    `has_default_recipe` is set for a bare model, which brings no settings of its own. `hub` is the name of what lies on the
    hub; once it has been fetched (`pqkv_cli.pipeline.hub.located`), `path` is where the hub's cache holds it.
    """

    reference: str
    kind: PathKind | None
    path: Path | None
    recipe: Recipe | None
    has_default_recipe: bool = False
    hub: HubName | None = None

    @property
    def run(self) -> Run:
        """The run that belongs to the target: itself, or the directory under ``runs/`` with its name."""
        if self.kind == "run" and self.path is not None:
            return Run(self.path)
        if self.recipe is None:
            raise UsageError(f"{self.reference} is an artifact; expected a model, a run or a recipe for this verb")
        return Run(RUNS / self.recipe.name)


def resolve_target(reference: str) -> Target:
    """Return what `reference` means.

    Raises
    ------
    ModelError
        If it is a path and nothing of ours lies there.
    UsageError
        If it is a word that names nothing, with the nearest names.
    RecipeError
        If it leads to a recipe that is not valid.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return _existing(reference, path)
    if reference in recipe_names():
        return Target(reference, None, None, named_recipe(reference))
    hub = parse_hub_name(reference)
    if hub is not None and hub.revision is not None:
        return Target(reference, None, None, None, hub=hub)  # pipelines start from models, of which no revision is kept
    if hub is not None:
        return Target(reference, None, None, _default_recipe(reference.split("/")[-1], reference), True, hub)
    if "/" in reference or reference.startswith(("~", ".")):
        raise ModelError(f"{reference} does not exist; expected a directory that holds {_EXPECTED}, or a GGUF file")
    names = [*recipe_names(), *(run.name for run in runs_under(RUNS))]
    raise UsageError(
        f"{reference!r} is neither an existing path nor a recipe{did_you_mean(reference, names)}; give a directory, "
        f"a GGUF file, an org/name hub id (of an artifact also org/name@revision), or one of {', '.join(recipe_names())}"
    )


def only_run() -> Target:
    """Return the only run under ``runs/``.

    Raises
    ------
    RunError
        If there is none.
    UsageError
        If there are several, which are then listed.
    """
    runs = runs_under(RUNS)
    if not runs:
        raise RunError(f"no run was named and there is none under {RUNS}/; start one with: pqkv calibrate MODEL")
    if len(runs) > 1:
        listed = ", ".join(map(str, runs))
        raise UsageError(f"no run was named and {RUNS}/ holds {len(runs)}: {listed}; choose one with --run")
    return _existing(str(runs[0]), runs[0])


def _existing(reference: str, path: Path) -> Target:
    kind = kind_of(path)
    match kind:
        case "run":
            return Target(reference, kind, path, load_recipe(path / RECIPE_FILE))
        case "model":
            # Absolute, so that the run can be used from any directory.
            absolute = path.resolve()
            name = absolute.stem if absolute.is_file() else absolute.name
            return Target(reference, kind, path, _default_recipe(name, str(absolute)), True)
        case "recipe":
            return Target(reference, kind, path, load_recipe(path))
        case "artifact":
            return Target(reference, kind, path, None)
    if path.is_dir():
        check_no_adapter(path)
    what = (
        "a file of another kind" if path.is_file() else "a directory without any of these" if any(path.iterdir()) else "empty"
    )
    hint = only_gguf(path) if path.is_dir() else ""
    raise ModelError(f"{reference} is {what}; expected {_EXPECTED}, or a GGUF file{hint and '.'}{hint}")


def _default_recipe(name: str, model: str) -> Recipe:
    cleaned = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).lstrip("._+-") or "model"
    return Recipe(name=cleaned, model=model)
