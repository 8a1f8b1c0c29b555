"""``pqkv run``: the whole chain of a recipe, doing only what is not done yet."""

from typing import TYPE_CHECKING

from pqkv_cli.cli.options import (
    BitsOption,
    CalibrationDataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OutOption,
    RunOption,
    SeedOption,
    TargetArgument,
)

if TYPE_CHECKING:
    from pqkv_cli.pipeline.stages import Whole


def run(
    target: TargetArgument = None,
    run: RunOption = None,
    out: OutOption = None,
    bits: BitsOption = None,
    data: CalibrationDataOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Do the whole chain of a recipe.

    Calibrates, fits, exports, evaluates and generates; what is done already is not done again.

    Example: pqkv run demo
    """
    from dataclasses import asdict

    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.result_table import raise_on_bad, show_records
    from pqkv_cli.cli.words import checked, path_or_none, target_of
    from pqkv_cli.pipeline.start import file_reference, start_run

    output, reporter = Output(json_target), TerminalReporter()
    changes = checked(
        {"codebooks.bits": bits, "calibration.data": file_reference(data), "seed": seed, "device": device, "dtype": dtype}
    )
    started, recipe = start_run(target_of(target, run, reporter), path_or_none(out), changes)

    from pqkv_cli.pipeline.stages import run_all

    whole = run_all(started, recipe, reporter)
    output.result(asdict(whole), show_records(whole.records), *_continuation(whole, recipe.generation.prompt))
    raise_on_bad(whole.records)


def _continuation(whole: "Whole", prompt: str) -> list[str]:
    made = whole.generation
    held, dense = made.cache_bytes.total, made.baseline_bytes
    return [f"\n{prompt}{made.text}\n", f"cache of this text: {held:,} bytes, uncompressed {dense:,} bytes"]
