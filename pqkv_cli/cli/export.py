"""``pqkv export``: write the artifact of a run."""

from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.options import (
    DebugOption,
    JsonOption,
    RunOption,
    SinksOption,
    TargetArgument,
    WindowOption,
)

if TYPE_CHECKING:
    from pqkv_cli.cli.output import Output
    from pqkv_cli.pipeline.outcome import StageOutcome
    from pqkv_cli.pipeline.push import Pushed

PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Also publish it on the Hugging Face hub, as one commit."),
]
PrivateOption = Annotated[
    bool, typer.Option("--private/--public", help="Who may see the repository, where --push-to-hub makes a new one.")
]


def export(
    target: TargetArgument = None,
    run: RunOption = None,
    num_sinks: SinksOption = None,
    window_tokens: WindowOption = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = True,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the artifact of a run.

    The artifact is one safetensors file; the files beside it are for people.

    With --push-to-hub it is published too; `pqkv generate ORG/NAME "..."` then uses it anywhere.

    Example: pqkv export my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.stage_table import show_stage
    from pqkv_cli.cli.words import checked, target_of
    from pqkv_cli.pipeline.start import continue_run

    output, reporter = Output(json_target), TerminalReporter()
    changes = checked({"cache.num_sinks": num_sinks, "cache.window_tokens": window_tokens})
    found, recipe = continue_run(target_of(target, run, reporter), changes)

    if push_to_hub is None:
        from pqkv_cli.pipeline.stages import run_stage

        return show_stage(run_stage("export", found, recipe, reporter), output, f"pqkv eval {found.path}")

    from pqkv_cli.pipeline.push import check_repository, export_and_push

    check_repository(push_to_hub)
    _show(*export_and_push(found, recipe, push_to_hub, is_private=private, reporter=reporter), output)


def _show(outcome: "StageOutcome", pushed: "Pushed", output: "Output") -> None:
    from dataclasses import asdict

    from pqkv_cli.cli.output import table
    from pqkv_cli.cli.stage_table import stage_document

    rows = [("repository", pushed.url), ("commit", pushed.commit), ("files", ", ".join(pushed.files))]
    output.result(
        stage_document(outcome) | {"pushed": asdict(pushed)},
        table("published", ("fact", "value"), rows),
        f"use it with: pqkv generate {pushed.repository}@{pushed.commit} ...",
    )
