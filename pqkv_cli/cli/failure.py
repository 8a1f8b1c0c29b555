"""What a failure looks like from outside: one message and one exit code. The only place that decides it."""

import errno
import shlex
import traceback
from collections.abc import Sequence

from pqkv_cli.cli.imports import ImportNote, failed_import
from pqkv_cli.cli.log_setup import Voice, own_words
from pqkv_cli.errors import PqkvError, UsageError, is_out_of_memory

_LESS = "a smaller --batch-size, --seq-len or --context, or another --device"
INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


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
