"""Writes files so that a reader sees the old or the new content, never half of it. Knows no formats and no torch."""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pqkv_cli.errors import PqkvError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")


def write_text(path: Path, text: str, error: type[PqkvError] = PqkvError) -> None:
    """Write `text` to `path` as UTF-8 with the line ends it has; otherwise as `write_bytes`.

    Half of a surrogate pair (a byte of a file's name that is no text) becomes an escape, which JSON reads back.

    Raises
    ------
    PqkvError
        As `write_bytes`.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), error)


def write_bytes(path: Path, data: bytes | bytearray, error: type[PqkvError] = PqkvError) -> None:
    """Write `data` to `path` so that at every moment the old file or the new one is there, even after a power cut.

    What writers of `path` that were killed have left beside it is removed.

    Parameters
    ----------
    path
        The file; its directory is made if need be.
    data
        The whole content.
    error
        What to raise.

    Raises
    ------
    PqkvError
        Of the class `error`, if it cannot be written; the old file is untouched and nothing else is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except (OSError, ValueError) as cause:
        raise error(_failure(path, len(data), cause)) from cause
    try:
        _sync_directory(path.parent)
    except OSError as cause:
        raise error(f"{path} is written, but its directory cannot be synced: {cause}; check the disk") from cause


@contextmanager
def new_directory(path: Path, error: type[PqkvError] = PqkvError) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends well, and is removed when it does not.

    If another process has made `path` meanwhile, its directory stays. What writers of `path` that were killed have left beside
    it is removed.

    Raises
    ------
    PqkvError
        Of the class `error`, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        with _locked_directory(path) as temporary:
            try:
                yield temporary
                _sync_files(temporary)
                if not path.exists():
                    temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        _sync_directory(path.parent)
    except OSError as cause:
        raise error(_failure(path, 0, cause)) from cause


def is_temporary(path: Path) -> bool:
    """Return whether `path` is named like what a writer that was killed has left."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _replace(path: Path, data: bytes | bytearray) -> None:
    _remove_left_behind(path)
    with _temporary(path) as (descriptor, temporary):
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        os.replace(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """Make and lock a file beside `path`: a rename is only atomic within one file system. Removed if the block fails."""
    descriptor, temporary = _locked_temporary(path)
    try:
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        raise


def _locked_temporary(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        # Another writer may have taken it for a dead one's before it was locked.
        if _lock(descriptor) and temporary.exists():
            return descriptor, temporary
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process holds it. The kernel frees what the dead have locked.

    By hand, because ``filelock`` opens a lock file of its own. Here the file being written is itself the lock, and so is the
    directory being filled: nothing beside them is left over, and whatever nobody has locked belongs to the dead.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks, on which nothing is ever taken for left behind
            pass
    return True


@contextmanager
def _locked_directory(path: Path) -> Iterator[Path]:
    """Make a directory beside `path` and hold its lock; where directories cannot be opened nothing counts as left behind."""
    descriptor = None
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        temporary.mkdir()
        if sys.platform == "win32":
            break
        with suppress(FileNotFoundError):  # as in `_locked_temporary`: taken for a dead one's before it was locked
            descriptor = os.open(temporary, os.O_RDONLY)
            if _lock(descriptor) and temporary.exists():
                break
            os.close(descriptor)
    try:
        yield temporary
    finally:
        if descriptor is not None:
            os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Return how many bytes are free where `path` lies or would be made.

    Raises
    ------
    OSError
        If the disk does not say.
    """
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block of the same `path`, an empty file that is made for this.

    Raises
    ------
    OSError
        If the file cannot be made.
    """
    from filelock import FileLock  # here, because it takes a third of the time that the command's help may take

    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    lock = FileLock(path, fallback_to_soft=False)
    with suppress(OSError):  # a file system without locks: everybody is on their own
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_left_behind(path: Path) -> None:
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and match["name"] == path.name:
                _remove_if_dead(Path(entry.path))


def _remove_if_dead(temporary: Path) -> None:
    if sys.platform == "win32":
        return
    with suppress(OSError):
        # Some file systems lock only what is open for writing, which a directory never is.
        descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_WRONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        finally:
            os.close(descriptor)


def remove_left_behind(directory: Path) -> None:
    """Remove from `directory` what writers that were killed have left there, whatever they were writing."""
    with suppress(OSError):
        for path in list(directory.iterdir()):
            if is_temporary(path):
                _remove_if_dead(path)


def _sync_files(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        else:
            _sync_directory(path)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync directories
            raise
    finally:
        os.close(descriptor)


def _failure(path: Path, num_bytes: int, error: OSError | ValueError) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "an unknown number of"
        with suppress(OSError):
            free = str(shutil.disk_usage(path.parent).free)
        needs = f"{path} needs {num_bytes} bytes and" if num_bytes else f"{path} does not fit;"
        return f"the disk is full ({reason}): {needs} {free} are free; nothing was changed; free some space and run again"
    return f"{path} cannot be written: {reason}; nothing was changed; choose another place or fix the rights, then run again"
