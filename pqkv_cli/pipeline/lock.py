"""One process at a time works on a run, and measures one task into the same files. Knows file locks only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
    # Where the kernel knows no locks, a file that stands for one would outlive a killed process: better no lock and an error.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield _holder(path)
        return
    except OSError as error:
        raise RunError(f"{path.parent} cannot be worked in ({error.strerror or error}): {remedy}") from error
    try:
        with suppress(OSError):  # the number only helps others; Windows lets nobody write what is locked
            path.write_text(str(os.getpid()), encoding="ascii")
        yield ""
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Return what whoever holds the lock file has written there: the number of its process."""
    try:
        return path.read_text(encoding="ascii").strip() or "unknown"
    except (OSError, ValueError):
        return "unknown"


def _remove_what_stayed_empty(run: Run, made: list[Path]) -> None:
    # A command that failed before it wrote anything leaves no directory behind.
    if made and list(run.path.iterdir()) == [run.lock_file]:
        run.lock_file.unlink()
        with suppress(OSError):
            for path in made:
                path.rmdir()
