"""What is published of a recipe: names, and nothing that only one machine knows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pqkv_cli.pipeline.push import portable
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import override

ARTIFACT: Any = SimpleNamespace(header=SimpleNamespace(model=SimpleNamespace(label="org/model")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stdlib:broad", "stdlib:broad"),
        ("self", "self"),
        ("hf:org/name?split=test", "hf:org/name?split=test"),
        ("hf:{folder}/set?split=test", "hf:set?split=test"),
        ("{folder}/own.txt", "own.txt"),
        ("{folder}/rows.jsonl?column=body", "rows.jsonl?column=body"),
    ],
)
def test_names_of_texts_stay_and_paths_lose_their_folders(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    recipe = override(
        Recipe(name="any", model=str(tmp_path / "model"), device="cpu"), {"calibration.data": [text.format(folder=tmp_path)]}
    )
    made = portable(recipe, ARTIFACT)
    assert (made.model, made.device, made.calibration.data) == ("org/model", "auto", (expected,))
