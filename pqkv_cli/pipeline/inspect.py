"""What can be said about a model, a run or an artifact by looking at its files. Loads no weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.artifact.summary import Summary, summarize
from pqkv_cli.errors import RunError, UsageError
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.models.structure import check_structure
from pqkv_cli.pipeline.capacity import Capacity, capacity
from pqkv_cli.pipeline.hub import located
from pqkv_cli.pipeline.rundir import Run, kind_of
from pqkv_cli.pipeline.state import STAGES, read_records, require_done
from pqkv_cli.pipeline.target import Target
from pqkv_cli.recipe import Recipe
from pqkv_cli.runtime.attach import backend_for
from pqkv_cli.specs import ModelGeometry
from pqkv_kernels.dispatch import Choice


@dataclass(frozen=True, slots=True)
class StageState:
    """One stage of a run: ``done``, ``unfinished``, ``outdated`` or ``missing``, and what is known about its outcome."""

    stage: str
    state: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; parts that do not apply are None."""

    kind: str
    label: str
    model: ModelGeometry | None = None
    recipe: Recipe | None = None
    stages: tuple[StageState, ...] | None = None
    artifact: Summary | None = None
    capacity: Capacity | None = None
    backend: Choice | None = None

    def document(self) -> dict[str, Any]:
        """Return the inspection as plain data for JSON."""
        return {
            "kind": self.kind,
            "label": self.label,
            "model": None if self.model is None else _model_document(self.model),
            "recipe": None if self.recipe is None else self.recipe.model_dump(mode="json"),
            "stages": None if self.stages is None else [asdict(stage) for stage in self.stages],
            "artifact": None if self.artifact is None else asdict(self.artifact),
            "capacity": None if self.capacity is None else asdict(self.capacity),
            "backend": None if self.backend is None else asdict(self.backend),
        }


def inspect_target(target: Target, device_bytes: int | None = None) -> Inspection:
    """Return what is known about `target`, and of a model how many tokens fit on a device of `device_bytes`.

    Raises
    ------
    UsageError
        If `device_bytes` are given and the target is no model.
    ModelError, UnsupportedModelError
        If a model cannot be read or its cache cannot be quantized.
    ArtifactError
        If an artifact is damaged, or the hub does not give it.
    """
    target = located(target)
    is_model = target.kind == "model" or (target.kind != "artifact" and kind_of(target.run.path) != "run")
    if device_bytes is not None and not is_model:
        found = "an artifact" if target.kind == "artifact" else "a run"
        raise UsageError(f"--gpu is given and {target.reference} is {found}; expected a model: name the model itself")
    if target.kind == "artifact" and target.path is not None:
        artifact = open_artifact(target.path)
        summary = summarize(artifact)
        return Inspection("artifact", summary.label, artifact=summary, backend=_backend(artifact))
    if not is_model:
        return _inspect_run(target.run)
    assert target.recipe is not None  # only artifacts have none
    resolved = resolve_model(target.recipe.model)
    config = load_config(resolved)
    shape = geometry(config)
    check_structure(config)
    fits = None if device_bytes is None else capacity(config, device_bytes, target.recipe.cache.spec)
    return Inspection("model", resolved.label, model=shape, capacity=fits)


def _inspect_run(run: Run) -> Inspection:
    stages = _stage_states(run)
    exported = run.artifact_file.is_file()
    artifact = open_artifact(run.artifact_file) if exported else None
    summary, backend = (None, None) if artifact is None else (summarize(artifact), _backend(artifact))
    return Inspection("run", str(run.path), recipe=run.recipe(), stages=stages, artifact=summary, backend=backend)


def _backend(artifact: Artifact) -> Choice:
    """Return what would attend to the artifact's codes on this machine."""
    return backend_for("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"), artifact.tables)


def _stage_states(run: Run) -> tuple[StageState, ...]:
    records, recipe = read_records(run), run.recipe()
    states = []
    for stage in STAGES:
        record = records.get(stage)
        if record is None:
            states.append(StageState(stage, "missing", {}))
            continue
        try:
            require_done(run, recipe, stage)
            state = "done"
        except RunError:
            state = "outdated" if record.done else "unfinished"
        states.append(StageState(stage, state, dict(record.facts or {})))
    return tuple(states)


def _model_document(model: ModelGeometry) -> dict[str, Any]:
    return asdict(model) | {"cache_bytes_per_token": model.cache_bytes_per_token()}
