"""Shows what a finished stage says about itself."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pqkv_cli.cli.output import Output, table

if TYPE_CHECKING:
    from pqkv_cli.pipeline.outcome import StageOutcome


def show_stage(outcome: "StageOutcome", output: Output, next_command: str) -> None:
    """Print one stage's outcome as two columns, and the command that comes next."""
    rows = [(name.replace("_", " "), value) for name, value in outcome.facts.items()]
    title = f"{outcome.stage}: {outcome.directory}"
    output.result(
        stage_document(outcome),
        table(title, ("fact", "value"), rows),
        f"next: {next_command}",
    )


def stage_document(outcome: "StageOutcome") -> dict[str, Any]:
    """Return one stage's outcome as JSON (``pqkv.stage/1``)."""
    return {"schema": "pqkv.stage/1", **asdict(outcome), "facts": dict(outcome.facts)}
