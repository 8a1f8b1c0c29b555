"""One fitted layer as a safetensors file, with what it was fitted from. Knows tables and bytes; nothing of fitting."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pqkv_cli.errors import RunError
from pqkv_cli.files import write_bytes
from pqkv_cli.fitting.fit import FittedLayer
from pqkv_cli.specs import SIDES, CodecSpec, Side
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.tables import CodecTables

METADATA_KEY = "pqkv_fit"


@dataclass(frozen=True, slots=True)
class LayerStamp:
    """What a layer file holds: the request it answers and the hash of its tensors."""

    request_sha256: str
    tensors_sha256: str


def make_directory(directory: Path) -> None:
    """Make the directory of a fit, where there is none.

    Raises
    ------
    RunError
        If it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{directory} cannot be made: {error.strerror or error}; expected a directory for codebooks; choose another run"
        ) from error


def layer_path(directory: Path, index: int) -> Path:
    """Return where layer `index` lies."""
    return directory / f"layer_{index:03d}.safetensors"


def save_layer(path: Path, fitted: FittedLayer, request_sha256: str) -> LayerStamp:
    """Write a layer whole or not at all; equal layers give equal bytes.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    tensors = _tensors(fitted)
    stamp = LayerStamp(request_sha256, tensors_sha256(tensors))
    document = {
        **asdict(stamp),
        "relative_error": {side: list(errors) for side, errors in fitted.relative_error.items()},
        "rotary": {side: asdict(t.rotary) if t.rotary is not None else None for side, t in fitted.tables.items()},
    }
    write_bytes(path, save(tensors, {METADATA_KEY: json.dumps(document, sort_keys=True)}), RunError)
    return stamp


def load_layer(path: Path, specs: Mapping[Side, CodecSpec]) -> tuple[FittedLayer, LayerStamp]:
    """Read and verify a layer; `specs` is empty for a layer that stays dense.

    Raises
    ------
    RunError
        If the file is missing or damaged.
    """
    advice = "run pqkv fit-codebooks on this run; only what is missing is fitted"
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        stamp = LayerStamp(document["request_sha256"], document["tensors_sha256"])
        if tensors_sha256(tensors) != stamp.tensors_sha256:
            raise ValueError("the hash of its tensors differs from the one it states")
        fitted = FittedLayer(
            {side: _tables(side, specs[side], tensors, document["rotary"][side]) for side in SIDES if side in specs},
            {side: tuple(errors) for side, errors in document["relative_error"].items()},
        )
    except FileNotFoundError:
        raise RunError(f"{path} is missing; expected one file per layer; {advice}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); expected a fitted layer; {advice}") from error
    return fitted, stamp


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash over names, dtypes, shapes and bytes of `tensors`, in order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _tensors(fitted: FittedLayer) -> dict[str, torch.Tensor]:
    tensors = {}
    for side, tables in fitted.tables.items():
        for stage, index, _, _, _ in tables.layout.spans():
            tensors[f"{side}.codebooks.{stage}.{index}"] = tables.codebooks[stage][index].contiguous()
        if tables.map is not None:
            tensors[f"{side}.map"] = tables.map.contiguous()
        if tables.permutation is not None:
            tensors[f"{side}.permutation"] = tables.permutation.contiguous()
        if tables.prediction is not None:
            tensors[f"{side}.prediction"] = tables.prediction.contiguous()
    return tensors


def _tables(side: Side, spec: CodecSpec, tensors: Mapping[str, torch.Tensor], rotary: Mapping[str, Any] | None) -> CodecTables:
    codebooks = tuple(
        tuple(tensors[f"{side}.codebooks.{i}.{j}"] for j in range(len(stage))) for i, stage in enumerate(spec.layout.stages)
    )
    return CodecTables(
        spec.layout,
        codebooks,
        tensors.get(f"{side}.map"),
        tensors.get(f"{side}.permutation"),
        None if rotary is None else RotaryLayout(**rotary),
        prediction=tensors[f"{side}.prediction"] if spec.predicted else None,
    )
