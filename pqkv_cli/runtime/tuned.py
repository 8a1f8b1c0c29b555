"""Kernel configurations that were measured on a GPU, in files beside the artifact. Measures nothing.

``kernels.<gpu>.json`` changes speed and nothing else: it is used where the name of the device is the one it was measured on,
and the shipped table of configurations serves everywhere else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.config import DecodeConfig, use_config
from pqkv_kernels.tuning import format_name, read_config

SCHEMA = "pqkv.kernels/1"
Tables = Sequence[Mapping[Side, CodecTables] | None]


def kernels_file(directory: Path, device_name: str) -> Path:
    """Return the file beside the artifact for a device by its name."""
    return directory / f"kernels.{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def tables_format(tables: Mapping[Side, CodecTables]) -> str:
    """Return what a configuration is measured for: the code formats of a layer."""
    return format_name(*(tables[side].layout for side in SIDES))


def read_tuned(directory: Path, device_name: str) -> dict[str, DecodeConfig]:
    """Return the configurations measured on `device_name`, by code format; none where there is no file for it.

    Raises
    ------
    ArtifactError
        If there is a file and it is not what `pqkv export --tune` writes.
    """
    path = kernels_file(directory, device_name)
    if not path.is_file():
        return {}
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise KernelError(f"its schema is not {SCHEMA!r}")
        if document.get("device") != device_name:
            return {}
        return {entry["format"]: read_config(entry["config"]) for entry in document["formats"]}
    except (KernelError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is unreadable ({error}); expected what `pqkv export --tune` writes: delete it, or tune again"
        ) from error


def use_tuned(tables: Tables, directory: Path, device: torch.device) -> str | None:
    """Let the keys' tables on `device` be read as was measured there; return which file says so, if any does.

    Raises
    ------
    ArtifactError
        As `read_tuned`.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    configs = read_tuned(directory, name)
    used = False
    for layer in tables:
        if layer is not None and (config := configs.get(tables_format(layer))) is not None:
            use_config(layer["keys"].to(device), config)
            used = True
    return kernels_file(directory, name).name if used else None
