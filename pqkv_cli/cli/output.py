"""Results on stdout, everything else on stderr. Knows rich and JSON, not what the results mean."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

from pqkv_cli.cli.log_setup import Heartbeat, current_voice
from pqkv_cli.cli.streams import json_text, write_result
from pqkv_cli.errors import UsageError
from pqkv_cli.files import write_text

if TYPE_CHECKING:
    from pqkv_cli.reporter import Advance

_WIDTH_WITHOUT_TERMINAL = 128


class Output:
    """Where the result of a verb goes: tables to stdout, JSON to where ``--json`` says.

    Raises
    ------
    UsageError
        If the JSON file cannot be written there; before any work is done.
    """

    def __init__(self, json_target: str | None) -> None:
        self.json_target = json_target
        if json_target not in (None, "-") and (Path(str(json_target)).is_dir() or not json_target):
            raise UsageError(f"--json is {json_target!r}, expected a file name, or '-' for stdout")

    def result(self, payload: object, *shown: RenderableType) -> None:
        """Print `payload` as JSON, or what is to be `shown` to people, whichever was asked for.

        Raises
        ------
        PqkvError
            If JSON was asked for on stdout and nobody reads it any more, or its file cannot be written.
        """
        stream = sys.stdout if self.json_target == "-" else None
        line = json_text(payload, stream, separators=(",", ":"), allow_nan=False)
        if stream is not None:
            write_result(line + "\n")
            return
        if self.json_target:
            write_text(Path(self.json_target), line + "\n")
        out = console()
        for each in shown:
            out.print(each)

    def last_line(self, line: str | None) -> None:
        """Print `line` for a program to read, unless stdout is JSON already."""
        if line is not None and self.json_target != "-":
            sys.stdout.write(line + "\n")


def console() -> Console:
    """Return a console on stdout that never cuts a table short for want of a terminal."""
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL,
        highlight=False,
        markup=False,
        emoji=False,  # what a model writes may hold :words: that mean nothing
        soft_wrap=True,
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table; columns after the first are right-aligned numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class TerminalReporter:
    """Notes and progress on stderr: a bar on a terminal; elsewhere a sign of life now and then, and a line at the end."""

    def __init__(self) -> None:
        self.voice = current_voice()
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def note(self, text: str) -> None:
        """Print one sentence."""
        plain = text.removeprefix("warning: ")
        if plain != text:
            self.voice.say("warning", "warning", plain)
        elif self.voice.has_bars:
            self.console.print(text, soft_wrap=True)  # above the bar, if there is one
        else:
            self.voice.say("info", "note", text)

    @contextmanager
    def progress(self, label: str) -> Iterator["Advance"]:
        """Show a bar while the block runs, and how long it took."""
        started = time.monotonic()
        if self.voice.has_bars:
            with self._bar(label) as advance:
                yield advance
        else:
            yield Heartbeat(self.voice, label)
        seconds = time.monotonic() - started
        self.voice.say("info", "step", f"{label}: {seconds:.1f} s", step=label, seconds=round(seconds, 3))

    @contextmanager
    def _bar(self, label: str) -> Iterator["Advance"]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
