"""Writes the pages of `docs/` that repeat what the code says: `make docs`. A test fails while one of them is not current.

Pages of verbs come from the command line itself, the page of recipes from the recipe's schema, the table of JSON forms in
`ci.md` from `docs/schemas/`, the table of `quickstart.md` from the published shapes that the tests hold recipes against, and
that of `models.md` from the families and ways to generate that the tests go through.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCHEMAS = DOCS / "schemas"
sys.path.insert(0, str(ROOT / "tests"))

MADE = "<!-- made by `make docs`; change the code instead -->\n"
BEGIN, END = "<!-- begin: made by `make docs` -->", "<!-- end -->"
_RECIPES = """\
# Recipes

A recipe is a YAML file that names a model and sets every option of the pipeline. `pqkv run RECIPE` does all of it.
`pqkv recipes show NAME` prints a recipe that comes with pqkv.
`pqkv recipes new MODEL -o mine.yaml` writes one for another model.
These come with pqkv; each is tested against the published shape of its model:
"""
_WRITING = """\
Unknown keys and values out of range are errors; all of them are reported at once. Your editor can check and complete a recipe:
write the schema with `pqkv recipes schema -o recipe.schema.json` and name it in the recipe's first line:

    # yaml-language-server: $schema=recipe.schema.json

## Settings

The pipeline has four stages: calibrate, fit-codebooks, export, eval. When a setting changes, the stage in the last column runs
again, and so does every stage after it. The command says which setting caused it.
"""
_CONTEXT_RATES = (16, 4, 3, 2)
_CARD_BYTES = 24 * 10**9


def pages() -> dict[Path, str]:
    """Return every generated file with the text it should have."""
    from pqkv_cli.recipe import Recipe
    from pqkv_cli.recipe_files import recipe_schema

    schema = recipe_schema(Recipe)
    made = {DOCS / "recipe.schema.json": json.dumps(schema, indent=1) + "\n"}
    made |= {DOCS / "cli" / f"{verb}.md": text for verb, text in verb_pages()}
    made[DOCS / "cli" / "README.md"] = verb_index()
    made[DOCS / "recipes.md"] = recipe_page(Recipe)
    for name, block in (("quickstart.md", context_table), ("models.md", path_table), ("ci.md", json_table)):
        made[DOCS / name] = with_block((DOCS / name).read_text(encoding="utf-8"), block())
    return made


def verb_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the page of every verb."""
    for verb, function in verbs().items():
        about, _, example = inspect.cleandoc(str(function.__doc__)).partition("Example: ")
        lines = [MADE, f"# `pqkv {verb}`\n", about.strip() + "\n"]
        if example:
            lines.append(f"    {example.strip()}\n")
        params = [(p, next(m for m in p.annotation.__metadata__ if hasattr(m, "help"))) for p in _parameters(function)]
        for title, kind in (("Argument", ArgumentInfo), ("Option", OptionInfo)):
            shown = [(p, info) for p, info in params if isinstance(info, kind) and not info.hidden]
            rows = [(f"`{_spelling(p, info)}`", _default(p), str(info.help)) for p, info in shown]
            lines += [table((title, "Default", "Meaning"), rows)] if rows else []
        lines.append(_json_line(verb))
        yield verb, "\n".join(lines)


def verb_index() -> str:
    """Return the list of verbs."""
    firsts = {verb: inspect.cleandoc(str(function.__doc__)).split("\n")[0] for verb, function in verbs().items()}
    rows = [(f"[`pqkv {verb}`]({verb}.md)", first) for verb, first in firsts.items()]
    note = "Exit codes, stderr and JSON are the same for all: [ci.md](../ci.md).\n"
    return "\n".join([MADE, "# Verbs\n", table(("Verb", "What it does"), rows), note])


def verbs() -> Mapping[str, Callable[..., None]]:
    """Return the verbs with all their options."""
    from pqkv_cli.cli.main import VERBS
    from pqkv_cli.cli.option_set import with_all_options

    return {verb: with_all_options(verb, function) for verb, function in VERBS.items()}


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def setting_schemas(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what a recipe's `schema` says of every setting, by its dotted name."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, field in schema["properties"].items():
        inner = field.get("properties")
        found |= {name: field} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return found


def recipe_page(model: Any) -> str:
    """Return the page of recipes: which there are, every setting, and what a change of it does again."""
    from pqkv_cli.recipe import settings
    from pqkv_cli.recipe_files import named_recipe, recipe_names, recipe_schema

    known = [named_recipe(name) for name in recipe_names()]
    schema = recipe_schema(model)
    found, declared = setting_schemas(schema), settings(model)
    required = [name for name in found if name in schema["required"]]
    rows = [
        (f"`{n}`", "" if n in required else _value(f.get("default")), _values(f), f["description"], _redone(declared[n]))
        for n, f in found.items()
    ]
    shipped = [(f"`{r.name}`", r.model, _value(r.codebooks.bits)) for r in known]
    titles = ("Setting", "Default", "Values", "Meaning", "Done again from")
    first, second = table(("Recipe", "Model", "Bits per channel"), shipped), table(titles, rows)
    return "\n".join([MADE, _RECIPES, first, _WRITING, second])


def _redone(setting: Any) -> str:
    first = next(iter(setting.stages), "nothing")
    return f"{first}, if the content differs" if setting.by_content else first


def context_table() -> str:
    """Return how many tokens of one row fit on a 24 GB card, for every recipe whose bf16 weights leave room there."""
    from published_models import MODELS, config_of

    from pqkv_cli.pipeline.capacity import capacity

    rows = []
    for name in MODELS:
        found = capacity(config_of(name), _CARD_BYTES)
        tokens = {row.bits: row.tokens[0] for row in found.rows}
        if tokens[_CONTEXT_RATES[0]]:
            rows.append((name, f"{found.weight_bytes / 1e9:.1f} GB", *(f"{tokens[bits]:,}" for bits in _CONTEXT_RATES)))
    titles = [f"{bits} b/ch" if bits != _CONTEXT_RATES[0] else "bf16" for bits in _CONTEXT_RATES]
    return table(("Model", "Weights (bf16)", *titles), rows)


def path_table() -> str:
    """Return which tiny model is tested on which way to generate."""
    from family_models import FAMILIES
    from generation_paths import OTHER_PATHS, PATHS, UNSUPPORTED

    paths = [*PATHS, *OTHER_PATHS]
    rows = [(f"`{name}`", *("no" if (name, path) in UNSUPPORTED else "✓" for path in paths)) for name in FAMILIES]
    return table(("Model type", *paths), rows)


def json_table() -> str:
    """Return the forms of JSON output: what each holds and which verbs write it. The schemas explain every key."""
    rows = [
        (f"[`{s['title']}`](schemas/{s['$id']})", s["description"], ", ".join(f"`{verb}`" for verb in s["x-verbs"]))
        for s in schemas()
    ]
    return table(("Form", "What it holds", "Written by"), rows)


def schemas() -> list[dict[str, Any]]:
    """Return the schemas of JSON output, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(SCHEMAS.glob("*.schema.json"))]


def table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    cells = [titles, tuple("---" for _ in titles), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def with_block(page: str, block: str) -> str:
    """Return `page` with what stands between the marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def _spelling(parameter: inspect.Parameter, info: Any) -> str:
    if isinstance(info, ArgumentInfo):
        return str(info.metavar or parameter.name.upper())
    kind = str(parameter.annotation.__origin__)
    value = "" if "bool" in kind else f" {info.metavar or ('X' if 'float' in kind else 'N')}"
    # In an annotation the first spelling stands where typer keeps a default otherwise.
    return ", ".join([info.default, *(info.param_decls or ())]) + value


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def _json_line(verb: str) -> str:
    own = [s for s in schemas() if any(each.split()[0] == verb for each in s["x-verbs"])]
    links = ", ".join(f"[`{s['title']}`](../schemas/{s['$id']})" for s in own)
    return f"JSON: {links}. [Exit codes and stderr](../ci.md#stdout-stderr-exit-codes).\n"


def _value(value: object) -> str:
    if isinstance(value, list):
        text = ", ".join(map(str, value))
    elif isinstance(value, str):
        text = value
    else:
        text = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return f"`{text}`" if text else ""


def _values(field: Mapping[str, Any]) -> str:
    options = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    field = options[0]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    bounds = [f"{word} {field[key]}" for key, word in (("minimum", "at least"), ("maximum", "at most")) if key in field]
    kind = {"integer": "whole number", "string": "text", "array": "list"}.get(field["type"], field["type"])
    return ", ".join([kind, *bounds])


def write(made: Mapping[Path, str]) -> None:
    """Write every page that is not current, and say which."""
    for path, text in made.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    write(pages())
