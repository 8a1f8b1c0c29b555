"""Calibration's two kinds of files, tensors and JSON, each whole or absent. Knows not what they mean."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pqkv_cli.errors import RunError
from pqkv_cli.files import write_bytes, write_text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to `path` as safetensors.

    Raises
    ------
    RunError
        If it cannot be written; the old file is untouched.
    """
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), RunError)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON with sorted keys.

    Raises
    ------
    RunError
        If it cannot be written; the old file is untouched.
    """
    write_text(path, json.dumps(content, sort_keys=True, indent=1) + "\n", RunError)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises
    ------
    RunError
        If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); expected JSON. Delete {path.parent} and calibrate again.") from error
    if not isinstance(content, dict):
        raise RunError(
            f"{path} holds a {type(content).__name__}; expected an object. Delete {path.parent} and calibrate again."
        )
    return content
