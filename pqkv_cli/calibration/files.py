"""Writing calibration files so that each is either whole or absent. Knows bytes; not what they mean."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pqkv_cli.errors import RunError


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to `path` through a temporary file, synced before it takes the name.

    Raises
    ------
    RunError
        If it cannot be written (full disk, rights); the temporary file is removed.
    """
    _atomic(path, lambda temporary: save_file({name: t.contiguous() for name, t in tensors.items()}, temporary))


def write_json(path: Path, content: Any) -> None:
    """Write canonical JSON to `path` in the same way.

    Raises
    ------
    RunError
        If it cannot be written; the temporary file is removed.
    """
    text = json.dumps(content, sort_keys=True, indent=1) + "\n"
    _atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises
    ------
    RunError
        If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); expected JSON. Delete {path.parent} and calibrate again.") from error
    if not isinstance(content, dict):
        raise RunError(
            f"{path} holds a {type(content).__name__}; expected an object. Delete {path.parent} and calibrate again."
        )
    return content


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk with an error class of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunError(
                f"{path} cannot be written: {error}. Free space or fix the rights and run again; finished parts are kept."
            ) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
