"""``pqkv doctor``: whether this machine is fit to run."""

import os
from typing import Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption


def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A run or artifact: which backend would attend to its codes.")
    ] = None,
    run: RunOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show versions, devices, which backend would run and why, and known traps.

    Exits with 1 if something is wrong.

    Example: pqkv doctor
    """
    from pqkv_cli.cli.output import Output, TerminalReporter, table
    from pqkv_cli.errors import PqkvError
    from pqkv_cli.pipeline.doctor import diagnose

    output, place = Output(json_target), None
    if target is not None or run is not None:
        # Only then: what a target is found with may itself be what is broken here.
        from pqkv_cli.cli.words import target_of
        from pqkv_cli.pipeline.start import target_artifact

        place = target_artifact(target_of(target, run, TerminalReporter()))
    made = diagnose(os.environ, place)
    rows = [(finding.name, finding.state, finding.found) for finding in made.findings]
    output.result(made.document(), table("this machine", ("what", "state", "what was found"), rows))
    if made.wrong:
        lines = "\n".join(f"  - {finding.name}: {finding.found}; mend it with: {finding.remedy}" for finding in made.wrong)
        raise PqkvError(f"this machine is not fit:\n{lines}")
