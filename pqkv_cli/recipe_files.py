"""Recipes read and written: strict YAML, changes of a command line, the JSON schema for editors, and those that pqkv brings.

Whatever is wrong with a recipe is said at once, a sentence per fault: where, what was found, what was expected.
"""

from collections.abc import Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pqkv_cli.errors import RecipeError, UsageError, did_you_mean
from pqkv_cli.rates import RATES
from pqkv_cli.recipe import Recipe, settings


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe that `text` describes; `source` names it in errors.

    Raises
    ------
    RecipeError
        With all faults of the text at once.
    """
    try:
        data, duplicates = _read_yaml(text)
    except ValueError as error:
        raise RecipeError(source, [f"not readable as YAML: {error}"]) from error
    if not isinstance(data, dict):
        raise RecipeError(source, [f"found {type(data).__name__}, expected keys with values such as 'model: ...'"])
    return _checked_recipe(data, source, duplicates)


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


def override(recipe: Recipe, changes: Mapping[str, object], source: str = "the recipe with these options") -> Recipe:
    """Return `recipe` with `changes` (dotted keys such as ``calibration.samples``; None leaves a value as it is).

    `source` names the changes in errors.

    Raises
    ------
    RecipeError
        If a key is unknown or a value not allowed.
    """
    data = recipe.model_dump()
    for dotted, value in changes.items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        inner = data
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return _checked_recipe(data, source, model=type(recipe))


def _checked_recipe(data: dict[str, Any], source: str, faults: Sequence[str] = (), model: type[Recipe] = Recipe) -> Recipe:
    """Return the recipe that `data` says; `source` names it in errors, and `faults` are some that were found before.

    Raises
    ------
    RecipeError
        With all faults at once.
    """
    found = list(faults)
    try:
        recipe = model.model_validate(data)
    except ValidationError as error:
        found += _fault_sentences(error, model)
    if found:
        raise RecipeError(source, found)
    return recipe


_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text (put it in quotes if it looks like a number or yes/no)",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "string_too_short": "text that is not empty",
    "too_short": "at least one entry",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def _fault_sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one sentence per fault that pydantic found in data meant for `model`."""
    details = error.errors()
    # pydantic also reports a list whose entries are wrong as too short.
    parents = {detail["loc"][:-1] for detail in details}
    return [_describe(detail, model) for detail in details if detail["loc"] not in parents]


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    *parents, last = detail["loc"] or ("",)
    where = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            known = tuple(_section(model, parents).model_fields)
            return f"{where}: unknown key{did_you_mean(str(last), known)}; known are {', '.join(known)}"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case "missing":
            return f"{where}: missing, but required"
        case "literal_error":
            expected = str(detail["ctx"]["expected"])
            names = expected.replace("'", "").replace(" or ", ", ").split(", ")
            return f"{where}: found {detail['input']!r}{did_you_mean(str(detail['input']), names)}; expected {expected}"
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return f"{where}: found {detail['input']!r}; {detail['msg']}"
    return f"{where}: found {detail['input']!r}, expected {template.format_map(detail.get('ctx', {}))}"


def _section(model: type[BaseModel], parents: Sequence[int | str]) -> type[BaseModel]:
    for name in parents:
        inner: Any = model.model_fields[str(name)].annotation
        model = inner
    return model


def _read_yaml(text: str) -> tuple[Any, list[str]]:
    """Return what `text` says, and a line about every key that one mapping has twice.

    Raises
    ------
    ValueError
        If it is no YAML 1.1 without tags; the message says where, on one line.
    """
    try:
        loader = _StrictLoader(text)  # refuses characters that YAML does not have
        return loader.get_single_data(), loader.duplicates
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last: an impossible date such as 2001-99-99
        raise ValueError(" ".join(str(error).split())) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without tags; remembers keys that occur twice in one mapping."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                self.duplicates.append(f"{name}: found twice, on lines {seen[name]} and {line}; expected once")
            seen[name] = line
        return super().construct_mapping(node, deep)


_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(model: type[Recipe] = Recipe) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file.

    It accepts what `parse_recipe` accepts, except that gates which contradict each other are found only there.
    """
    schema = model.model_json_schema()
    sections = schema.pop("$defs")
    for name, field in list(schema["properties"].items()):
        if "$ref" in field:
            schema["properties"][name] = _without_title(sections[field["$ref"].rsplit("/", 1)[-1]])
    for name, declared in settings(model).items():
        *section, key = name.split(".")
        inside = schema["properties"][section[0]]["properties"] if section else schema["properties"]
        inside[key] = _without_title(inside[key]) | {"description": declared.help}
    schema["properties"]["codebooks"]["properties"]["bits"]["enum"] = sorted(RATES, reverse=True)
    about = "A recipe of pqkv: a model and every setting of the pipeline."
    return {"$schema": _DRAFT, **schema, "title": "pqkv recipe", "description": about}


def _without_title(field: dict[str, Any]) -> dict[str, Any]:
    """Return `field` without what pydantic makes of its Python name; a section keeps the first line of its docstring."""
    kept = {key: value for key, value in field.items() if key != "title"}
    if "description" in kept:
        kept["description"] = str(kept["description"]).split("\n")[0]
    return kept
