"""One process at a time works on a run, and measures one task into the same files. Knows file locks only."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.rundir import Run


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the lock of `run`; the kernel drops it when the process ends, however it ends.

    Raises
    ------
    RunError
        If another process holds it, or nothing can be written there.
    """
    made = [path for path in (run.path, *run.path.parents) if not path.exists()]
    with _held(run.lock_file, "a run writes its files there; choose another directory with -o, or fix the rights") as owner:
        if owner:
            raise RunError(f"{run.path} is in use by process {owner}; wait until it has ended, or work in another run with -o")
        try:
            yield
        finally:
            _remove_what_stayed_empty(run, made)


@contextmanager
def locked_task(results: Path, task: str, mode: str) -> Iterator[None]:
    """Hold the results of one task in one mode, so that no two processes measure it into the same files.

    Raises
    ------
    RunError
        If another process holds it, or nothing can be written there.
    """
    remedy = "results are written there; free some space or fix the rights, or evaluate a copy of the artifact"
    with _held(results / f".{task}-{mode}.lock", remedy) as owner:
        if owner:
            raise RunError(
                f"{task}, mode {mode}, is being measured into {results} by process {owner}; wait until it has ended, or "
                "evaluate a copy of the artifact"
            )
        yield


@contextmanager
def _held(path: Path, remedy: str) -> Iterator[str]:
    """Hold the lock file `path`; yield nothing, or who holds it already."""
    with _opened(path, remedy) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or "unknown"
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield ""


def _opened(path: Path, remedy: str) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="ascii")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise RunError(f"{path.parent} cannot be worked in ({error.strerror or error}): {remedy}") from error


def _remove_what_stayed_empty(run: Run, made: list[Path]) -> None:
    # A command that failed before it wrote anything leaves no directory behind.
    if made and list(run.path.iterdir()) == [run.lock_file]:
        run.lock_file.unlink()
        with suppress(OSError):
            for path in made:
                path.rmdir()
