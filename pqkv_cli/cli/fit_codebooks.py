"""``pqkv fit-codebooks``: learn the codebooks of a calibrated run."""

from pqkv_cli.cli.option_set import Changes
from pqkv_cli.cli.options import BitsOption, BudgetOption, DebugOption, JsonOption, RunOption, TargetArgument


def fit_codebooks(
    target: TargetArgument = None,
    run: RunOption = None,
    bits: BitsOption = None,
    budget: BudgetOption = None,
    *,
    changes: Changes,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Learn the codebooks of a calibrated run.

    Example: pqkv fit-codebooks my-run --budget 2.5
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import show_stage
    from pqkv_cli.cli.words import checked, rate_changes, target_of
    from pqkv_cli.pipeline.start import continue_run

    output, reporter = Output(json_target), TerminalReporter()
    wanted = checked({**changes, **rate_changes(bits, budget)})
    found, recipe = continue_run(target_of(target, run, reporter), wanted)

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("fit-codebooks", found, recipe, reporter), output, f"pqkv export {found.path}")
