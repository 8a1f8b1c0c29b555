"""``pqkv calibrate``: run text through a model and record what its cache looks like."""

from pqkv_cli.cli.options import (
    BatchSizeOption,
    CalibrationDataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OutOption,
    RecallShareOption,
    ReservoirOption,
    RunOption,
    SamplesOption,
    SeedOption,
    SeqLenOption,
    TargetArgument,
)


def calibrate(
    target: TargetArgument = None,
    run: RunOption = None,
    out: OutOption = None,
    data: CalibrationDataOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = None,
    reservoir_size: ReservoirOption = None,
    recall_share: RecallShareOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Record what a model's keys, values and queries look like.

    Example: pqkv calibrate path/to/model --data text.txt --samples 32 --seq-len 512 -o my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.stage_table import show_stage
    from pqkv_cli.cli.words import checked, path_or_none, target_of
    from pqkv_cli.pipeline.start import file_reference, start_run

    output, reporter = Output(json_target), TerminalReporter()
    changes = checked(
        {
            "calibration.data": file_reference(data),
            "calibration.samples": samples,
            "calibration.seq_len": seq_len,
            "calibration.batch_size": batch_size,
            "calibration.reservoir_size": reservoir_size,
            "calibration.recall_share": recall_share,
            "seed": seed,
            "device": device,
            "dtype": dtype,
        }
    )
    started, recipe = start_run(target_of(target, run, reporter), path_or_none(out), changes)

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("calibrate", started, recipe, reporter), output, f"pqkv fit-codebooks {started.path}")
