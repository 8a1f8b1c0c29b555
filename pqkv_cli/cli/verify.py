"""``pqkv verify``: whether an artifact is whole and belongs to a model."""

from typing import Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption, TargetArgument

AgainstOption = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="Also check that the artifact was made for this model.")
]


def verify(
    target: TargetArgument = None,
    run: RunOption = None,
    against: AgainstOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Check that an artifact is whole, that its codecs work, and that it belongs to a model.

    Exits with 1 if anything is wrong.

    Example: pqkv verify my-run --against meta-llama/Llama-3.1-8B
    """
    from pqkv_cli.cli.output import Output, TerminalReporter, table
    from pqkv_cli.cli.words import target_of

    output = Output(json_target)
    found = target_of(target, run, TerminalReporter())

    from pqkv_cli.pipeline.place import artifact_place
    from pqkv_cli.pipeline.verify import verify as verify_artifact

    made = verify_artifact(artifact_place(found), against)
    rows = [(check.name, check.state, check.detail) for check in made.checks]
    output.result(made.document(), table(str(made.path), ("check", "result", "what was found"), rows))
    made.require_passed()
