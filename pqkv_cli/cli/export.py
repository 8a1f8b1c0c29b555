"""``pqkv export``: write the artifact of a run."""

from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.option_set import Changes
from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption, TargetArgument
from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.pipeline.push import Pushed
    from pqkv_cli.pipeline.state import StageOutcome

PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Also publish it on the Hugging Face hub, as one commit."),
]
PrivateOption = Annotated[
    bool, typer.Option("--private/--public", help="Who may see the repository, where --push-to-hub makes a new one.")
]

TuneOption = Annotated[
    bool, typer.Option("--tune", help="Measure kernel configurations on this GPU and keep the fastest beside the artifact.")
]
ByteTablesOption = Annotated[
    bool,
    typer.Option("--byte-tables", hidden=True, help="Removed."),
]


def export(
    target: TargetArgument = None,
    run: RunOption = None,
    *,
    changes: Changes,
    push_to_hub: PushOption = None,
    private: PrivateOption = True,
    tune: TuneOption = False,
    byte_tables: ByteTablesOption = False,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the artifact of a run.

    The artifact is one safetensors file; the files beside it are for people.

    With --push-to-hub it is published too; `pqkv generate ORG/NAME "..."` then uses it anywhere.

    Example: pqkv export my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import show_stage
    from pqkv_cli.cli.words import checked, target_of
    from pqkv_cli.pipeline.start import continue_run

    output, reporter = Output(json_target), TerminalReporter()
    _check_tuning(tune, byte_tables, push_to_hub)
    found, recipe = continue_run(target_of(target, run, reporter), checked(changes))
    if push_to_hub is None:
        from pqkv_cli.pipeline.stages import run_stage

        if tune:
            outcome = run_stage("export", found, recipe, reporter)
            return _show_tuned(outcome, found.artifact, output, reporter)

        return show_stage(run_stage("export", found, recipe, reporter), output, f"pqkv eval {found.path}")

    from pqkv_cli.pipeline.push import check_repository, export_and_push

    check_repository(push_to_hub)
    _show(*export_and_push(found, recipe, push_to_hub, is_private=private, reporter=reporter), output)


def _check_tuning(tune: bool, byte_tables: bool, push_to_hub: str | None) -> None:
    """Refuse what cannot be tuned, before a run is opened."""
    if byte_tables:
        raise UsageError(
            "--byte-tables is gone: look-up tables of bytes were never timed on a GPU. Use --tune alone: pqkv export RUN --tune"
        )
    if tune:
        from pqkv_cli.benchmarks.tune import require_gpu

        if push_to_hub is not None:
            raise UsageError("--tune and --push-to-hub are two steps; expected one: tune first, then push")
        require_gpu()


def _show_tuned(outcome: "StageOutcome", directory: "Path", output: "Output", reporter: "TerminalReporter") -> None:
    from pqkv_cli.benchmarks.tune import tune_artifact
    from pqkv_cli.cli.output import table
    from pqkv_cli.cli.tables import stage_document
    from pqkv_kernels.tuning import config_document

    tuned = tune_artifact(directory, reporter)
    winners = {name: config_document(config) for name, config in tuned.winners.items()}
    shown = ("num_warps", "max_registers", "tables", "programs_per_processor", "origin")
    rows = [(name, *(config[key] for key in shown)) for name, config in winners.items()]
    output.result(
        stage_document(outcome) | {"tuned": {"path": str(tuned.path), "device": tuned.device, "winners": winners}},
        table(
            f"fastest kernels, in {tuned.path}",
            ("code format", "warps", "registers at most", "tables", "programs per processor", "measured"),
            rows,
        ),
    )


def _show(outcome: "StageOutcome", pushed: "Pushed", output: "Output") -> None:
    from dataclasses import asdict

    from pqkv_cli.cli.output import table
    from pqkv_cli.cli.tables import stage_document

    rows = [("repository", pushed.url), ("commit", pushed.commit), ("files", ", ".join(pushed.files))]
    output.result(
        stage_document(outcome) | {"pushed": asdict(pushed)},
        table("published", ("fact", "value"), rows),
        f"use it with: pqkv generate {pushed.repository}@{pushed.commit} ...",
    )
