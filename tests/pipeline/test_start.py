"""Which directories a run may be started in."""

from pathlib import Path

import pytest

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.start import continue_run, start_run
from pqkv_cli.pipeline.target import resolve_target
from pqkv_cli.recipe_files import dump_recipe, named_recipe


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


@pytest.mark.parametrize(
    ("tasks", "limit", "expected"),
    [
        (None, None, 8),
        (["passkey"], None, 8),
        (["perplexity", "longbench"], None, 8),
        (["longbench"], None, None),
        (["kld"], 3, 3),
    ],
)
def test_the_sizes_a_recipe_gives_its_tasks_are_not_for_others(
    tasks: list[str] | None, limit: int | None, expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(named_recipe("demo")))
    changes = {"evaluation.tasks": tasks, "evaluation.limit": limit}
    _, recipe = continue_run(resolve_target(str(tmp_path)), changes)
    assert (recipe.evaluation.limit, recipe.evaluation.tasks) == (expected, tuple(tasks or ("perplexity", "passkey")))
    assert recipe.evaluation.data == "stdlib:evaluation"


@pytest.mark.parametrize(("limit", "expected"), [(None, (8, 1)), (3, (3, None))])
def test_a_limit_is_that_of_pass_keys_too(limit: int | None, expected: tuple[int, int | None], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(named_recipe("demo")))
    _, recipe = continue_run(resolve_target(str(tmp_path)), {"evaluation.tasks": ["passkey"], "evaluation.limit": limit})
    assert (recipe.evaluation.limit, recipe.evaluation.prompts) == expected
