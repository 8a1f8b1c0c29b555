"""``pqkv calibrate``: run text through a model and record what its cache looks like."""

from pqkv_cli.cli.option_set import Changes
from pqkv_cli.cli.options import DebugOption, JsonOption, OutOption, RecipeModelOption, RunOption, TargetArgument


def calibrate(
    target: TargetArgument = None,
    run: RunOption = None,
    out: OutOption = None,
    model: RecipeModelOption = None,
    *,
    changes: Changes,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Record what a model's keys, values and queries look like.

    Example: pqkv calibrate path/to/model --data text.txt --samples 32 --seq-len 512 -o my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import show_stage
    from pqkv_cli.cli.words import checked, path_or_none, target_of
    from pqkv_cli.pipeline.start import file_reference, start_run

    output, reporter = Output(json_target), TerminalReporter()
    wanted = checked({**changes, "model": file_reference(model)})
    started, recipe = start_run(target_of(target, run, reporter), path_or_none(out), wanted)

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("calibrate", started, recipe, reporter), output, f"pqkv fit-codebooks {started.path}")
