"""Writing a file whole or not at all. Knows nothing of what is in it."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from pqkv_cli.errors import ArtifactError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that at every moment the old file or the new one is there, even after a power cut.

    Raises
    ------
    ArtifactError
        If it cannot be written; the old file is untouched and nothing else is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise ArtifactError(_failure(path, len(data), error)) from error
    try:
        _sync_directory(path.parent)
    except OSError as error:
        raise ArtifactError(f"{path} is written, but its directory cannot be synced: {error}; check the disk") from error


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "an unknown number of"
        with contextlib.suppress(OSError):
            free = str(shutil.disk_usage(path.parent).free)
        return (
            f"the disk is full: {path} needs {num_bytes} bytes and {free} are free; "
            "nothing was changed; free some space and run the command again"
        )
    return f"{path} cannot be written: {error}; nothing was changed; choose another place and run the command again"
