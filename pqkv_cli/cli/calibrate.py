"""``pqkv calibrate``: run text through a model and record what its cache looks like."""

from dataclasses import dataclass

from pqkv_cli.cli.option_set import takes
from pqkv_cli.cli.options import (
    BatchSizeOption,
    CalibrationDataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FisherOption,
    JsonOption,
    OutOption,
    RecallShareOption,
    RecipeModelOption,
    ReservoirOption,
    RunOption,
    SamplesOption,
    SeedOption,
    SeqLenOption,
    TargetArgument,
)


@dataclass(frozen=True, slots=True)
class CalibrateWords:
    """The words of ``pqkv calibrate``."""

    target: TargetArgument = None
    run: RunOption = None
    out: OutOption = None
    model: RecipeModelOption = None
    data: CalibrationDataOption = None
    samples: SamplesOption = None
    seq_len: SeqLenOption = None
    batch_size: BatchSizeOption = None
    reservoir_size: ReservoirOption = None
    recall_share: RecallShareOption = None
    fisher: FisherOption = None
    seed: SeedOption = None
    device: DeviceOption = None
    dtype: DtypeOption = None
    json_target: JsonOption = None
    debug: DebugOption = False

    def changes(self) -> dict[str, object]:
        """Return what they say of the recipe."""
        from pqkv_cli.pipeline.start import file_reference, text_references

        return {
            "model": file_reference(self.model),
            "calibration.data": text_references(self.data),
            "calibration.samples": self.samples,
            "calibration.seq_len": self.seq_len,
            "calibration.batch_size": self.batch_size,
            "calibration.reservoir_size": self.reservoir_size,
            "calibration.recall_share": self.recall_share,
            "calibration.fisher": None if self.fisher is None else int(self.fisher),
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
        }


@takes(CalibrateWords)
def calibrate(words: CalibrateWords) -> None:
    """Record what a model's keys, values and queries look like.

    Example: pqkv calibrate path/to/model --data text.txt --samples 32 --seq-len 512 -o my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import show_stage
    from pqkv_cli.cli.words import checked, path_or_none, target_of
    from pqkv_cli.pipeline.start import start_run

    output, reporter = Output(words.json_target), TerminalReporter()
    target = target_of(words.target, words.run, reporter)
    started, recipe = start_run(target, path_or_none(words.out), checked(words.changes()))

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("calibrate", started, recipe, reporter), output, f"pqkv fit-codebooks {started.path}")
