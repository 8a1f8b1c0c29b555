"""One process at a time works on a run. Knows file locks only."""

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
    with _opened(run) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise RunError(
                f"{run.path} is in use by process {owner}; wait until it has ended, or work in another run with -o"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            _remove_what_stayed_empty(run, made)


def _opened(run: Run) -> IO[str]:
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        return open(run.lock_file, "a+", encoding="ascii")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise RunError(
            f"{run.path} cannot be worked in ({error.strerror or error}): a run writes its files there; "
            "choose another directory with -o, or fix the rights"
        ) from error


def _remove_what_stayed_empty(run: Run, made: list[Path]) -> None:
    # A command that failed before it wrote anything leaves no directory behind.
    if made and list(run.path.iterdir()) == [run.lock_file]:
        run.lock_file.unlink()
        with suppress(OSError):
            for path in made:
                path.rmdir()
