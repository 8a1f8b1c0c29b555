"""``pqkv recipes``: which recipes there are, what one of them says, a new one for a model, and their schema."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption
from pqkv_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pqkv_cli.cli.output import Output
    from pqkv_cli.recipe import Recipe

_ACTIONS = ("list", "show", "new", "schema")


def recipes(
    action: Annotated[
        str,
        typer.Argument(
            metavar="list|show|new|schema",
            help="List all recipes, show one, write one for a model, or print their JSON schema.",
        ),
    ] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to show, or the model of the new one.")] = None,
    run: RunOption = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="Where to write the new recipe or the schema. [default: stdout]"),
    ] = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """List the recipes, show one, write one from a model's config, or print the schema that editors check them with.

    With --run, the effective recipe of a run is shown.

    Example: pqkv recipes new org/model -o mine.yaml
    """
    from pqkv_cli.cli.output import Output
    from pqkv_cli.recipe_files import recipe_names

    output = Output(json_target)
    if action not in _ACTIONS:
        hint = did_you_mean(action, _ACTIONS) or (f"; try: pqkv recipes show {action}" if action in recipe_names() else "")
        raise UsageError(f"recipes knows 'list', 'show NAME', 'new MODEL' and 'schema', not {action!r}{hint}")
    if out is not None and action not in ("new", "schema"):
        raise UsageError("--out belongs to 'new' and 'schema'; expected: pqkv recipes new MODEL --out FILE")
    if action == "new":
        _write_new(output, name, run, out)
    elif action == "schema":
        _show_schema(output, name, out)
    elif action == "list" and run is None:
        _list(output)
    else:
        _show(output, name, run)


def _list(output: "Output") -> None:
    from pqkv_cli.cli.output import table
    from pqkv_cli.recipe_files import named_recipe, recipe_names

    known = [named_recipe(each) for each in recipe_names()]
    rows = [(r.name, r.model, r.codebooks.bits, r.calibration.samples, r.calibration.seq_len) for r in known]
    columns = ("recipe", "model", "bits", "samples", "tokens each")
    document = {"schema": "pqkv.recipes/1", "recipes": [r.model_dump(mode="json") for r in known]}
    output.result(document, table("recipes", columns, rows))


def _show(output: "Output", name: str | None, run: str | None) -> None:
    from pqkv_cli.pipeline.target import resolve_target
    from pqkv_cli.recipe_files import dump_recipe, named_recipe, recipe_names

    if name is None and run is None:
        raise UsageError(f"show needs a name; expected one of {', '.join(recipe_names())}")
    recipe = named_recipe(str(name)) if run is None else resolve_target(run).recipe
    if recipe is None:
        raise UsageError(f"{run} is an artifact; its recipe.yaml lies beside it")
    text = dump_recipe(recipe)
    output.result(_document(recipe), text.rstrip())


def _show_schema(output: "Output", name: str | None, out: str | None) -> None:
    from pqkv_cli.files import write_text
    from pqkv_cli.recipe_files import recipe_schema

    if name is not None:
        raise UsageError(f"found {name!r} after 'schema', which is the same for all recipes; expected: pqkv recipes schema")
    schema = recipe_schema()
    text = json.dumps(schema, indent=1)
    if out is not None:
        file = Path(out).expanduser()
        write_text(file, text + "\n")
        text = f"{file}: name it in the first line of a recipe: # yaml-language-server: $schema={file}"
    output.result(schema, text)


def _write_new(output: "Output", model: str | None, run: str | None, out: str | None) -> None:
    if model is None or run is not None:
        raise UsageError(
            "new needs a model and no --run; expected: pqkv recipes new MODEL, a directory, a GGUF file or an org/name hub id"
        )

    from pqkv_cli.pipeline.draft import check_recipe_file, draft_recipe, write_recipe

    file = None if out is None else Path(out).expanduser()
    if file is not None:
        check_recipe_file(file)
    draft = draft_recipe(model)
    shown = draft.text.rstrip()
    if file is not None:
        write_recipe(draft, file)
        shown = f"{file}: start it with: pqkv run {file}"
    output.result(_document(draft.recipe, file), shown)


def _document(recipe: "Recipe", file: Path | None = None) -> dict[str, object]:
    from pqkv_cli.recipe import recipe_hash

    path = None if file is None else str(file)
    return {"schema": "pqkv.recipe/1", "recipe": recipe.model_dump(mode="json"), "sha256": recipe_hash(recipe), "path": path}
