"""Where the artifact of a target lies. Opens nothing, and fetches what lies on the hub."""

from pathlib import Path

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.hub import located
from pqkv_cli.pipeline.start import started_run
from pqkv_cli.pipeline.target import Target


def artifact_place(target: Target) -> Path:
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
