"""``pqkv eval``: measure an artifact next to the uncompressed model."""

from pqkv_cli.cli.options import (
    ContextOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EvaluationDataOption,
    ForceOption,
    JsonOption,
    LimitOption,
    ModelOption,
    ModeOption,
    RunOption,
    SeedOption,
    TargetArgument,
    TaskOption,
)


def evaluate(
    target: TargetArgument = None,
    run: RunOption = None,
    task: TaskOption = None,
    data: EvaluationDataOption = None,
    mode: ModeOption = None,
    context: ContextOption = None,
    limit: LimitOption = None,
    model: ModelOption = None,
    force: ForceOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure an artifact next to the uncompressed model.

    Example: pqkv eval my-run --task perplexity --data held-out.txt --mode all
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.result_table import raise_on_bad, show_records
    from pqkv_cli.cli.words import checked, target_of
    from pqkv_cli.pipeline.start import artifact_source, file_reference

    output, reporter = Output(json_target), TerminalReporter()
    changes = {
        "evaluation.tasks": task or None,
        "evaluation.data": file_reference(data),
        "evaluation.modes": mode or None,
        "evaluation.context": context,
        "evaluation.limit": limit,
        "evaluation.prompts": limit,
        **{"seed": seed, "device": device, "dtype": dtype},
    }
    checked(changes)
    source = artifact_source(target_of(target, run, reporter), model, changes)

    from pqkv_cli.pipeline.evaluate import evaluate_source

    records = evaluate_source(source, reporter, force=force)
    output.result(records[0] if len(records) == 1 else records, show_records(records))
    raise_on_bad(records)
