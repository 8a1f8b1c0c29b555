"""The file of stages, damaged in every way that JSON allows."""

from pathlib import Path

import pytest

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.inspect import inspect_target
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.target import resolve_target
from pqkv_cli.recipe_files import named_recipe


@pytest.mark.parametrize(
    "content",
    [
        "",
        "5",
        "[]",
        '"calibrate"',
        "[" * 100_000,
        '{"calibrate": 5}',
        '{"calibrate": {}}',
        '{"calibrate": {"inputs": 5, "done": true}}',
        '{"calibrate": {"inputs": null}}',
        '{"calibrate": {"inputs": {}, "done": 1}}',
        '{"calibrate": {"inputs": {}, "done": true, "facts": 7}}',
        '{"calibrate": {"inputs": {}, "done": true, "facts": [1]}}',
        '{"calibrate": {"inputs": {}, "surplus": 1}}',
        "\xff",
    ],
)
def test_a_damaged_file_is_refused_in_words(content: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_recipe(named_recipe("demo"))
    run.stages_file.write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=r"stages.json is damaged .*delete it and run the stages again"):
        inspect_target(resolve_target(str(tmp_path)))
