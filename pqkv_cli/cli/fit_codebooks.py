"""``pqkv fit-codebooks``: learn the codebooks of a calibrated run."""

from pqkv_cli.cli.options import (
    BitsOption,
    BudgetOption,
    DebugOption,
    DeviceOption,
    IterationsOption,
    JsonOption,
    KeySpaceOption,
    ProfileOption,
    PrototypeBitsOption,
    RefineOption,
    RunOption,
    SeedOption,
    TargetArgument,
)


def fit_codebooks(
    target: TargetArgument = None,
    run: RunOption = None,
    bits: BitsOption = None,
    budget: BudgetOption = None,
    profile: ProfileOption = None,
    prototype_bits: PrototypeBitsOption = None,
    key_space: KeySpaceOption = None,
    iterations: IterationsOption = None,
    refine: RefineOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
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
    changes = checked(
        {
            **rate_changes(bits, budget),
            "codebooks.profile": profile,
            "codebooks.prototype_bits": prototype_bits,
            "codebooks.key_space": key_space,
            "codebooks.iterations": iterations,
            "codebooks.refine": refine,
            "seed": seed,
            "device": device,
        }
    )
    found, recipe = continue_run(target_of(target, run, reporter), changes)

    from pqkv_cli.pipeline.stages import run_stage

    show_stage(run_stage("fit-codebooks", found, recipe, reporter), output, f"pqkv export {found.path}")
