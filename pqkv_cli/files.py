"""Writes files so that a reader sees the old or the new content, never half of it. Knows no formats and no torch."""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from pqkv_cli.errors import PqkvError


def write_text(path: Path, text: str, error: type[PqkvError] = PqkvError) -> None:
    """Write `text` to `path` as UTF-8 with the line ends it has; otherwise as `write_bytes`.

    Raises
    ------
    PqkvError
        As `write_bytes`.
    """
    write_bytes(path, text.encode("utf-8"), error)


def write_bytes(path: Path, data: bytes, error: type[PqkvError] = PqkvError) -> None:
    """Write `data` to `path` so that at every moment the old file or the new one is there, even after a power cut.

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


def _replace(path: Path, data: bytes) -> None:
    # In the same directory: a rename is only atomic within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        raise


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
        return (
            f"the disk is full ({reason}): {path} needs {num_bytes} bytes and {free} are free; "
            "nothing was changed; free some space and run again"
        )
    return f"{path} cannot be written: {reason}; nothing was changed; choose another place or fix the rights, then run again"
