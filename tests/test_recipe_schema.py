"""The recipe's JSON schema: current, complete, and of one mind with the parser."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pqkv_cli.errors import RecipeError
from pqkv_cli.recipe import settings
from pqkv_cli.recipe_files import dump_recipe, named_recipe, parse_recipe, recipe_names, recipe_schema
from tools.generate_docs import setting_schemas

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "recipe.schema.json"
FIRST_LINE = "# yaml-language-server: $schema=../docs/recipe.schema.json"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_shipped_file_is_current() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8")) == recipe_schema(), "run: make docs"


def test_every_setting_is_described_and_no_other() -> None:
    described = {name: field["description"] for name, field in setting_schemas(recipe_schema()).items()}
    assert described == {name: setting.help for name, setting in settings().items()}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_name_the_schema_and_obey_it(name: str, validator: Draft202012Validator) -> None:
    file = ROOT / "recipes" / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.startswith(FIRST_LINE + "\n")
    assert (file.parent / FIRST_LINE.split("=")[1]).resolve() == FILE
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []
    assert [error.message for error in validator.iter_errors(yaml.safe_load(dump_recipe(named_recipe(name))))] == []


@pytest.mark.parametrize(
    "extra",
    [
        "calibratoin: {}",
        "calibration: {smaples: 3}",
        "calibration: {samples: 1}",
        "calibration: {recall_share: 1.5}",
        "codebooks: {bits: 9.25}",
        "codebooks: {bits: '4'}",
        "codebooks: {prototype_bits: 9}",
        "codebooks: {key_space: measured}",
        "dtype: flaot16",
        "device: gpu",
        "seed: -1",
        "seed: 1.5",
        "generation: {prompt: no}",
        "evaluation: {tasks: [pass key]}",
        "evaluation: {tasks: []}",
        "evaluation: {modes: [al]}",
        "evaluation: perplexity",
        "name: two words",
    ],
)
def test_what_the_parser_refuses_the_schema_refuses(extra: str, validator: Draft202012Validator) -> None:
    text = ("" if extra.startswith("name") else "name: mine\n") + f"model: org/name\n{extra}\n"
    with pytest.raises(RecipeError):
        parse_recipe(text, "test")
    assert list(validator.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize("missing", ["name", "model"])
def test_what_is_required_is_required(missing: str, validator: Draft202012Validator) -> None:
    given: dict[str, Any] = {"name": "mine", "model": "org/name"}
    del given[missing]
    assert [error.validator for error in validator.iter_errors(given)] == ["required"]
