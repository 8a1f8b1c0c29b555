"""Turns the words of a command line into targets and paths. Knows no verb."""

from pathlib import Path
from typing import TYPE_CHECKING

from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pqkv_cli.cli.option_set import Changes
    from pqkv_cli.pipeline.target import Target
    from pqkv_cli.reporter import Reporter


def target_of(target: str | None, run: str | None, reporter: "Reporter") -> "Target":
    """Return what TARGET or ``--run`` means; without both, the only run there is, named to the `reporter`.

    Raises
    ------
    UsageError
        If both are given and differ.
    """
    from pqkv_cli.pipeline.target import only_run, resolve_target

    if target is not None and run is not None and target != run:
        raise UsageError(f"both {target!r} and --run {run!r} are given; expected one of them")
    reference = run if target is None else target
    if reference is not None:
        return resolve_target(reference)
    found = only_run()
    reporter.note(f"using the only run: {found.reference}")
    return found


def path_or_none(word: str | None) -> Path | None:
    """Return the path that `word` names, with ``~`` resolved."""
    return None if word is None else Path(word).expanduser()


def gate_texts(
    gates: "Sequence[str] | None", min_recovery: str | None, max_kld: str | None, max_ppl_increase: str | None
) -> list[str]:
    """Return the gates of a command line, its short forms spelt out."""
    short = {"recovery>=": min_recovery, "kl_bits<=": max_kld, "perplexity.increase<=": max_ppl_increase}
    return [*(gates or []), *(f"*.{form}{bound}" for form, bound in short.items() if bound is not None)]


def task_words(
    tasks: "Sequence[str] | None", modes: "Sequence[str] | None", *, generated: bool
) -> "tuple[list[str] | None, list[str] | None]":
    """Return the tasks and modes asked for, None where they are left to the recipe; `generated` turns kld into its other form.

    Raises
    ------
    UsageError
        If `generated` is asked for without the task it belongs to.
    """
    named = list(tasks or [])
    if not generated:
        return named or None, list(modes or []) or None
    if "kld" not in named:
        raise UsageError("--generated belongs to the task kld; expected --task kld --generated")
    return ["kld_generated" if task == "kld" else task for task in named], list(modes or ["cache"])


def rate_changes(bits: float | None, budget: float | None) -> "Changes":
    """Return what ``--bits`` or ``--budget`` changes in a recipe.

    Raises
    ------
    UsageError
        If both are given.
    """
    if bits is not None and budget is not None:
        raise UsageError(
            f"both --bits {bits:g} and --budget {budget:g} are given; expected one: one rate everywhere, or a mean of rates"
        )
    if bits is not None:
        return {"codebooks.allocation": "uniform", "codebooks.bits": bits}
    return {} if budget is None else {"codebooks.allocation": "measured", "codebooks.bits": budget}


def checked(changes: "Changes") -> "Changes":
    """Return `changes` of a recipe, all found to be allowed before anything is opened.

    Raises
    ------
    RecipeError
        With all that are not.
    """
    from pqkv_cli.recipe import Recipe
    from pqkv_cli.recipe_files import override

    override(Recipe(name="any", model="any"), changes, "this command line")
    return changes
