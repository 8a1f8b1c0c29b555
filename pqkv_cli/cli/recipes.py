"""``pqkv recipes``: which recipes there are, and what one of them says."""

from typing import Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption


def recipes(
    action: Annotated[str, typer.Argument(metavar="list|show", help="List all recipes, or show one.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to show.")] = None,
    run: RunOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """List the recipes, or show one.

    Example: pqkv recipes show demo. With --run, the effective recipe of a run is shown.
    """
    from pqkv_cli.cli.output import Output, table
    from pqkv_cli.errors import UsageError, did_you_mean
    from pqkv_cli.pipeline.target import resolve_target
    from pqkv_cli.recipe import dump_recipe, named_recipe, recipe_hash, recipe_names

    output = Output(json_target)
    if action not in ("list", "show"):
        hint = did_you_mean(action, ("list", "show")) or (
            f"; try: pqkv recipes show {action}" if action in recipe_names() else ""
        )
        raise UsageError(f"recipes knows 'list' and 'show NAME', not {action!r}{hint}")
    if action == "list" and run is None:
        known = [named_recipe(each) for each in recipe_names()]
        rows = [(r.name, r.model, r.codebooks.bits, r.calibration.samples, r.calibration.seq_len) for r in known]
        columns = ("recipe", "model", "bits", "samples", "tokens each")
        output.result([r.model_dump(mode="json") for r in known], table("recipes", columns, rows))
        return
    if name is None and run is None:
        raise UsageError(f"show needs a name; expected one of {', '.join(recipe_names())}")
    recipe = named_recipe(str(name)) if run is None else resolve_target(run).recipe
    if recipe is None:
        raise UsageError(f"{run} is an artifact; its recipe.yaml lies beside it")
    text = dump_recipe(recipe)
    output.result({"recipe": recipe.model_dump(mode="json"), "sha256": recipe_hash(recipe)}, text.rstrip())
