"""The command ``pqkv``: finds the verb, and turns every failure into a message and an exit code. Imports no torch."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pqkv_cli import __version__
from pqkv_cli.cli.bench import bench
from pqkv_cli.cli.calibrate import calibrate
from pqkv_cli.cli.diff import diff
from pqkv_cli.cli.doctor import doctor
from pqkv_cli.cli.evaluate import evaluate
from pqkv_cli.cli.export import export
from pqkv_cli.cli.failure import INTERRUPTED, Terminated, report_failure
from pqkv_cli.cli.fit_codebooks import fit_codebooks
from pqkv_cli.cli.generate import generate
from pqkv_cli.cli.imports import failed_import, quiet_imports
from pqkv_cli.cli.inspect import inspect
from pqkv_cli.cli.log_setup import current_voice, own_words, speaking, wanted_voice
from pqkv_cli.cli.option_set import with_all_options
from pqkv_cli.cli.prefix import prefix
from pqkv_cli.cli.processes import joined_processes
from pqkv_cli.cli.recipes import recipes
from pqkv_cli.cli.report import report
from pqkv_cli.cli.run import run
from pqkv_cli.cli.streams import lasting_streams
from pqkv_cli.cli.verify import verify
from pqkv_cli.errors import UsageError, did_you_mean

VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "calibrate": calibrate,
    "fit-codebooks": fit_codebooks,
    "export": export,
    "eval": evaluate,
    "generate": generate,
    "prefix": prefix,
    "bench": bench,
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
    "report": report,
    "recipes": recipes,
    "doctor": doctor,
}

# Plain help: rich's markdown help takes as long to import as all the rest.
_PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}


class _Verbs(TyperGroup):
    """The verbs, each made when it is called: options of the recipe's settings need pydantic, which takes long to import."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the verb called `cmd_name` with all of its options, None where there is none."""
        if cmd_name in VERBS and cmd_name not in self.commands:
            alone = typer.Typer(add_completion=False, **_PLAIN)
            alone.command(cmd_name)(with_all_options(cmd_name, VERBS[cmd_name]))
            self.add_command(typer.main.get_command(alone), cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first line of every verb, for which none of them is made."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, str(verb.__doc__).partition("\n")[0]) for name, verb in VERBS.items()])


app = typer.Typer(name="pqkv", cls=_Verbs, **_PLAIN)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"pqkv {__version__}\n")
        raise typer.Exit


_EPILOG = """Start with: pqkv run demo

Exit codes: 0 good, 1 failed, 2 misused, 3 a quality gate was not met, 130 interrupted, 143 terminated."""


@app.callback(epilog=_EPILOG)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress the key/value caches of language models by product quantization."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pqkv`` with `arguments` (default: the process's own) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with lasting_streams(), speaking(wanted_voice(words)):
        try:
            with _sigterm_raises(), warnings.catch_warnings(), quiet_imports("--debug" in own_words(words)) as keep:
                warnings.showwarning = partial(_show_warning, keep)
                with joined_processes(words) as own:
                    return _dispatch(own)
        except (Exception, KeyboardInterrupt, Terminated) as error:
            return report_failure(error, words, current_voice())
        except SystemExit as error:
            if failed_import(error) is None:
                raise
            return report_failure(error, words, current_voice())


def _dispatch(words: list[str]) -> int:
    verb = words[0] if words else ""
    if verb and not verb.startswith("-") and verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}; expected one of {', '.join(VERBS)}")
    command = typer.main.get_command(app)
    code = command.main(args=words or ["--help"], prog_name="pqkv", standalone_mode=False)
    sys.stdout.flush()
    if code == INTERRUPTED:
        raise KeyboardInterrupt  # typer has swallowed it
    return int(code or 0) if words else UsageError.exit_code


def _show_warning(keep: Callable[[str], bool], message: Warning | str, *_: object, **__: object) -> None:
    if not keep(f"{message}\n"):
        current_voice().say("warning", "warning", str(message))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
