"""The recipe as a JSON schema, for editors: what each setting means, and which values it takes. Opens no files."""

from collections.abc import Mapping
from typing import Any

from pqkv_cli.rates import RATES
from pqkv_cli.recipe import Recipe, settings

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(model: type[Recipe] = Recipe) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file.

    It accepts what `recipe_files.parse_recipe` accepts, except that gates which contradict each other are found only there.
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
    return {"$schema": DRAFT, **schema, "title": "pqkv recipe", "description": about}


def setting_schemas(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what a recipe's `schema` says of every setting, by its dotted name."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, field in schema["properties"].items():
        inner = field.get("properties")
        found |= {name: field} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return found


def _without_title(field: dict[str, Any]) -> dict[str, Any]:
    """Return `field` without what pydantic makes of its Python name; a section keeps the first line of its docstring."""
    kept = {key: value for key, value in field.items() if key != "title"}
    if "description" in kept:
        kept["description"] = str(kept["description"]).split("\n")[0]
    return kept
