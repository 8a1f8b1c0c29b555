"""``pqkv report``: a run's results as one page to look at."""

from typing import Annotated

import typer

from pqkv_cli.cli.options import DebugOption, JsonOption, RunOption, TargetArgument

FileOption = Annotated[
    str | None, typer.Option("-o", "--out", metavar="FILE", help="Where to write it. [default: report.html in the run]")
]


def report(
    target: TargetArgument = None,
    run: RunOption = None,
    out: FileOption = None,
    json_target: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a run's results as one HTML page that needs no network.

    Example: pqkv report my-run
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.words import path_or_none, target_of

    output = Output(json_target)
    found = target_of(target, run, TerminalReporter())

    from pqkv_cli.pipeline.report import write_report

    made = write_report(found, path_or_none(out))
    others = f"; {made.num_other_records} results of other artifacts are left out" if made.num_other_records else ""
    document = {
        "schema": "pqkv.report/1",
        "path": str(made.path),
        "records": made.num_records,
        "other_records": made.num_other_records,
    }
    output.result(document, f"{made.path}: {made.num_records} results{others}")
