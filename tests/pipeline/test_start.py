"""Which directories a run may be started in."""

from pathlib import Path

import pytest

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.start import start_run
from pqkv_cli.pipeline.target import resolve_target


def test_what_a_run_killed_at_its_very_start_left_is_a_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".recipe.yaml.0123456789ab.tmp").write_text("name: de")
    run, recipe = start_run(resolve_target("demo"), tmp_path, {})
    assert (run.path, recipe.model) == (tmp_path, "demo")


@pytest.mark.parametrize("name", ["notes.txt", ".recipe.yaml.tmp", ".hidden"])
def test_foreign_files_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RunError, match="exists and is no run"):
        start_run(resolve_target("demo"), tmp_path, {})
