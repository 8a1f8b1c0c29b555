"""``pqkv export``: write the artifact of a run."""

from pqkv_cli.cli.options import (
    DebugOption,
    JsonOption,
    RunOption,
    SinksOption,
    TargetArgument,
    WindowOption,
)


def export(
    target: TargetArgument = None,
    run: RunOption = None,
    num_sinks: SinksOption = None,
    window_tokens: WindowOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the artifact of a run.

    The artifact is one safetensors file; the files beside it are for people.

    Example: pqkv export my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.stage_table import show_stage
    from pqkv_cli.cli.words import checked, target_of
    from pqkv_cli.pipeline.start import continue_run

    output, reporter = Output(json_target), TerminalReporter()
    changes = checked({"cache.num_sinks": num_sinks, "cache.window_tokens": window_tokens})
    found, recipe = continue_run(target_of(target, run, reporter), changes)

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("export", found, recipe, reporter), output, f"pqkv eval {found.path}")
