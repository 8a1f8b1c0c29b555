"""The command ``pqkv``: finds the verb, and turns every failure into one message and one exit code. Imports no torch."""

import errno
import shlex
import signal
import sys
import threading
import traceback
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
from pqkv_cli.cli.fit_codebooks import fit_codebooks
from pqkv_cli.cli.generate import generate
from pqkv_cli.cli.imports import ImportNote, failed_import, quiet_imports
from pqkv_cli.cli.inspect import inspect
from pqkv_cli.cli.log_setup import Voice, current_voice, own_words, speaking, wanted_voice
from pqkv_cli.cli.option_set import with_all_options
from pqkv_cli.cli.prefix import prefix
from pqkv_cli.cli.processes import joined_processes
from pqkv_cli.cli.recipes import recipes
from pqkv_cli.cli.report import report
from pqkv_cli.cli.run import run
from pqkv_cli.cli.streams import lasting_streams
from pqkv_cli.cli.verify import verify
from pqkv_cli.errors import PqkvError, UsageError, did_you_mean, is_out_of_memory

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

_LESS = "a smaller --batch-size, --seq-len or --context, or another --device"
INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


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


def describe(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """Return the message and the exit code for `error`, raised by ``pqkv ARGUMENTS``."""
    again = f"pqkv {shlex.join(arguments)}"
    resume = f"nothing is half-written and finished work is kept; the same command goes on: {again}"
    if isinstance(error, PqkvError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        return f"interrupted: {resume}", INTERRUPTED
    if isinstance(error, Terminated):
        return f"terminated: {resume}", TERMINATED
    if hasattr(error, "format_message"):  # typer's own errors: wrong options and arguments
        verb = next((word for word in arguments if not word.startswith("-")), "")
        return f"error: {error.format_message()}; see: pqkv {verb + ' ' if verb else ''}--help", 2
    if _is_disk_full(error):
        return f"error: the disk is full ({error}); temporary files were removed; free some space, then: {again}", 1
    if is_out_of_memory(error):
        return f"error: out of memory ({_one_line(error)}); ask for less: {_LESS}", 1
    failed = failed_import(error)
    if failed is not None:
        return _import_message(*failed), 1
    if isinstance(error, OSError):
        return f"error: {error}; see that it can be read and written, then: {again}", 1
    return f"error: unexpected {type(error).__name__}: {_one_line(error)}; run again with --debug for the traceback", 1


def report_failure(error: BaseException, arguments: Sequence[str], voice: Voice) -> int:
    """Say what failed, with the traceback if ``--debug`` asks for it, and return the exit code."""
    message, code = describe(error, arguments)
    trace = "".join(traceback.format_exception(error)) if "--debug" in own_words(arguments) else ""
    if voice.is_json:
        facts = {"exit_code": code, "kind": kind_of(error)} | ({"traceback": trace} if trace else {})
        voice.say("error", "error", message.removeprefix("error: "), **facts)
    else:
        voice.stream.write(f"{trace}{message}\n")
    return code


def kind_of(error: BaseException) -> str:
    """Return the class that a program can tell the failure by: one of `pqkv_cli.errors`, or what Python calls it."""
    if hasattr(error, "format_message"):
        return UsageError.__name__
    is_interrupt = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
    return KeyboardInterrupt.__name__ if is_interrupt else type(error).__name__


def _is_disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in codes) or "No space left on device" in str(error)


def _import_message(error: BaseException, note: ImportNote) -> str:
    wrote = next((line.strip() for line in note.written.splitlines() if line.strip()), None)
    before = "" if wrote is None else f", after it had written: {wrote}"
    return (
        f"error: {note.package} is installed but cannot be imported: {type(error).__name__}: {_one_line(error)}{before}; "
        "install it again (pqkv doctor looks at this machine), or run again with --debug for the traceback and all it wrote"
    )


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0]
