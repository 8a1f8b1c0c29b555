"""Recipes as text: read from strict YAML, written as YAML, and those that come with pqkv by name. Knows no settings."""

from importlib import resources
from pathlib import Path

import yaml

from pqkv_cli.errors import RecipeError, UsageError, did_you_mean
from pqkv_cli.recipe import Recipe, checked_recipe
from pqkv_cli.strict_yaml import read_yaml


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe that `text` describes; `source` names it in errors.

    Raises
    ------
    RecipeError
        With all faults of the text at once.
    """
    try:
        data, duplicates = read_yaml(text)
    except ValueError as error:
        raise RecipeError(source, [f"not readable as YAML: {error}"]) from error
    if not isinstance(data, dict):
        raise RecipeError(source, [f"found {type(data).__name__}, expected keys with values such as 'model: ...'"])
    return checked_recipe(data, source, duplicates)


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in the file `path`.

    Raises
    ------
    RecipeError
        If the file is no valid recipe.
    UsageError
        If it cannot be read.
    """
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {error}") from error


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with pqkv, sorted."""
    entries = resources.files("pqkv_recipes").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml")))


def named_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises
    ------
    UsageError
        If there is none, with the nearest name.
    """
    names = recipe_names()
    if name not in names:
        raise UsageError(f"there is no recipe {name!r}{did_you_mean(name, names)}; known are {', '.join(names)}")
    return parse_recipe((resources.files("pqkv_recipes") / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}")


def dump_recipe(recipe: Recipe) -> str:
    """Return the YAML of `recipe`, every setting written out."""
    data = recipe.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
