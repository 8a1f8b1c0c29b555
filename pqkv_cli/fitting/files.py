"""Writing a file whole or not at all. Knows bytes and paths."""

import contextlib
import os
from pathlib import Path

from pqkv_cli.errors import RunError


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary file beside it; readers see the old file or the new one.

    Raises
    ------
    RunError
        If it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path} could not be written: {error.strerror or error}; expected room for {len(content)} bytes and the right to "
            "write there; free some space or choose another run directory, then run the same command again"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
