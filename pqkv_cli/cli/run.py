"""``pqkv run``: the whole chain of a recipe, doing only what is not done yet."""

from typing import TYPE_CHECKING

from pqkv_cli.cli.option_set import Changes
from pqkv_cli.cli.options import (
    BitsOption,
    BudgetOption,
    DebugOption,
    JsonOption,
    OutOption,
    RecipeModelOption,
    RunOption,
    TargetArgument,
)

if TYPE_CHECKING:
    from pqkv_cli.pipeline.stages import Whole


def run(
    target: TargetArgument = None,
    run: RunOption = None,
    out: OutOption = None,
    model: RecipeModelOption = None,
    bits: BitsOption = None,
    budget: BudgetOption = None,
    *,
    changes: Changes,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Do the whole chain of a recipe.

    Calibrates, fits, exports, evaluates and generates; what is done already is not done again.

    Example: pqkv run demo
    """
    from dataclasses import asdict

    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import raise_on_bad, show_records, verdict
    from pqkv_cli.cli.words import checked, path_or_none, rate_changes, target_of
    from pqkv_cli.pipeline.start import file_reference, start_run

    output, reporter = Output(json_target), TerminalReporter()
    wanted = checked({**changes, **rate_changes(bits, budget), "model": file_reference(model)})
    started, recipe = start_run(target_of(target, run, reporter), path_or_none(out), wanted)

    from pqkv_cli.pipeline.stages import run_all

    whole = run_all(started, recipe, reporter)
    output.result(
        {"schema": "pqkv.run/1", **asdict(whole)}, show_records(whole.records), *_continuation(whole, recipe.generation.prompt)
    )
    output.last_line(verdict(whole.records))
    raise_on_bad(whole.records)


def _continuation(whole: "Whole", prompt: str) -> list[str]:
    made = whole.generation
    held, dense = made.cache_bytes, made.baseline_bytes
    lines = [f"\n{prompt}{made.text}\n", f"cache of this text: {held.total:,} bytes, uncompressed {dense:,} bytes"]
    if held.total > dense:
        lines.append(
            f"({held.exact:,} bytes are the exact first and most recent tokens, whatever the length: longer texts gain)"
        )
    longest = _longest_cache(whole)
    return lines if longest is None else [*lines, longest]


def _longest_cache(whole: "Whole") -> str | None:
    """Return a line on the fullest cache that the evaluation measured, None where it measured none."""
    measured = [r["cache_bytes"] for r in whole.records if r["cache_bytes"]["num_tokens"]]
    if not measured:
        return None
    most = max(measured, key=lambda held: int(held["num_tokens"]))
    ratio = most["baseline"] / most["quantized"]
    return f"at {most['num_tokens']:,} tokens the cache was {ratio:.1f} times smaller than uncompressed"
