"""Publishes an artifact on the hub, in one commit with what belongs to it. Knows no terminal."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pqkv_cli import __version__
from pqkv_cli.artifact.card import CARD_FILE, HEADER_FILE, header_text, model_card
from pqkv_cli.artifact.schema import ARTIFACT_FILE
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.calibration.text import HUB, STDLIB
from pqkv_cli.errors import RunError, UsageError, first_line
from pqkv_cli.pipeline.export import export
from pqkv_cli.pipeline.lock import locked
from pqkv_cli.pipeline.rundir import RECIPE_FILE, Run
from pqkv_cli.pipeline.state import StageOutcome
from pqkv_cli.pipeline.target import parse_hub_name
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import dump_recipe, override
from pqkv_cli.reporter import Reporter


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was published: where, as which commit, and which files."""

    repository: str
    commit: str
    url: str
    files: tuple[str, ...]


def check_repository(repository: str) -> None:
    """Refuse a word that cannot name a repository to push to.

    Raises
    ------
    UsageError
        If it is not ``org/name``.
    """
    name = parse_hub_name(repository)
    if name is None or name.revision is not None:
        raise UsageError(f"--push-to-hub is {repository!r}; expected ORG/NAME, without a revision")


def export_and_push(
    run: Run, recipe: Recipe, repository: str, *, is_private: bool, reporter: Reporter
) -> tuple[StageOutcome, Pushed]:
    """Export `run` where that is not done, and publish its artifact as `repository`.

    The repository is made if need be; `is_private` decides only then. With the artifact go its header, its model card, its
    recipe without the paths of this machine, and the results of just this artifact.

    Raises
    ------
    RunError
        If the run cannot be exported, or the hub refuses or cannot be reached; what the hub held before stays.
    ArtifactError
        If the artifact is damaged; nothing is published then.
    """
    with locked(run):  # so that all files are of the same export
        outcome = export(run, recipe, reporter)
        files = _files(run, recipe, open_artifact(run.artifact_file))
        with reporter.progress("push"):
            return outcome, _push(files, repository, is_private, f"pqkv {__version__}: {outcome.facts['sha256'][:12]}")


def _push(files: Mapping[str, bytes], repository: str, is_private: bool, message: str) -> Pushed:
    additions = [huggingface_hub.CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=is_private, exist_ok=True)
        made = api.create_commit(repository, additions, commit_message=message)
    except Exception as error:  # Any transport library may sit below.
        raise _failure(repository, error) from error
    return Pushed(repository, made.oid, f"{api.endpoint}/{repository}", tuple(sorted(files)))


def _files(run: Run, recipe: Recipe, artifact: Artifact) -> dict[str, bytes]:
    card = run.artifact / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if artifact.sha256 not in text:  # of an earlier artifact
        text = model_card(artifact.header)
    texts = {HEADER_FILE: header_text(artifact.header), CARD_FILE: text, RECIPE_FILE: dump_recipe(portable(recipe, artifact))}
    results = {f"results/{path.name}": path.read_text(encoding="utf-8") for path in _own_results(run, artifact)}
    derived = {name: content.encode() for name, content in {**texts, **results}.items()}
    return {ARTIFACT_FILE: artifact.path.read_bytes(), **derived}


def _own_results(run: Run, artifact: Artifact) -> Iterable[Path]:
    for path in sorted(run.results.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(record, Mapping) and record.get("artifact_sha256") == artifact.sha256:
            yield path


def portable(recipe: Recipe, artifact: Artifact) -> Recipe:
    """Return `recipe` as another machine may read it: with names instead of this machine's paths, on whatever device."""
    named = {
        "calibration.data": [_name(text) for text in recipe.calibration.data],
        "evaluation.data": _name(recipe.evaluation.data),
    }
    return override(recipe, {"model": artifact.header.model.label, "device": "auto", **named})


def _name(text: str) -> str:
    """Return `text` without what only this machine knows: of a path its last part, of a name all of it."""
    form = HUB if text.startswith(HUB) else ""
    place = text.removeprefix(form)
    is_name = text.startswith(STDLIB) or (form and not Path(place.partition("?")[0]).expanduser().is_dir())
    return text if is_name else form + Path(place).name


def _failure(repository: str, error: Exception) -> RunError:
    reason = first_line(error)[:200]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return RunError(
            f"the hub does not let you write to {repository} ({reason}); log in with a token that may write (HF_TOKEN, or "
            "`hf auth login`), or choose another name; the artifact itself is exported"
        )
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE forbids the hub"
    return RunError(
        f"{repository} could not be published: {reason}; the artifact itself is exported: push again when the hub answers"
    )
