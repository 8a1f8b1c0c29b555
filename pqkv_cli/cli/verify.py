"""``pqkv verify``: whether an artifact is whole and belongs to a model."""

from typing import Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption, TargetArgument
from pqkv_cli.errors import UsageError

AgainstOption = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="Also check that the artifact was made for this model.")
]

QualityOption = Annotated[
    int | None,
    typer.Option(
        "--quality-windows",
        metavar="N",
        min=1,
        help="Also measure the first N windows of the recorded perplexity (mode all) again, and compare.",
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="The text that was evaluated on, if not the recipe's.")
]


def verify(
    target: TargetArgument = None,
    run: RunOption = None,
    against: AgainstOption = None,
    quality_windows: QualityOption = None,
    data: DataOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Check that an artifact is whole, that its codecs work, that it belongs to a model and is as good as recorded.

    Exits with 1 if anything is wrong, with 3 if only the quality is not what was recorded when it was evaluated.

    Example: pqkv verify my-run --against meta-llama/Llama-3.1-8B
    """
    from pqkv_cli.cli.output import Output, TerminalReporter, table
    from pqkv_cli.cli.words import target_of

    output, reporter = Output(json_target), TerminalReporter()
    if against is None and quality_windows is not None:
        raise UsageError("--quality-windows measures with a model; name it with --against")
    found = target_of(target, run, reporter)

    from pqkv_cli.pipeline.start import artifact_source, file_reference, target_artifact
    from pqkv_cli.pipeline.verify import QualityRequest
    from pqkv_cli.pipeline.verify import verify as verify_artifact

    if quality_windows is None:
        made = verify_artifact(target_artifact(found), against, note=reporter.note)
    else:
        source = artifact_source(found, against, {"evaluation.data": file_reference(data)})
        made = verify_artifact(source.artifact, against, QualityRequest(source, quality_windows), reporter.note)
    rows = [(check.name, check.state, check.detail) for check in made.checks]
    output.result(made.document(), table(str(made.path), ("check", "result", "what was found"), rows))
    made.require_passed()
