"""The header of an artifact as frozen data. Knows no files and no tensors; `pqkv_cli.artifact.header` reads and writes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pqkv_cli.specs import CompressionPlan, LayerGeometry

FORMAT = "pqkv"
VERSION = 1
# What an artifact is called in its directory.
ARTIFACT_FILE = "pqkv.safetensors"
# Each codec compiles its own kernel, and so does each group.
MAX_CODECS = 6
MAX_GROUPS = 3
MAX_STAGES = 4

KernelConfig = Mapping[str, int | str | bool]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model an artifact belongs to; the hashes tell a fine-tune from its base."""

    label: str
    model_type: str
    config_sha256: str
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Where the statistics came from: no time, host or path, so that equal input gives equal bytes."""

    data_sha256: str
    num_samples: int
    num_held_out: int
    seq_len: int
    reservoir_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class LayerError:
    """Relative squared error of one layer's codes on calibration data, one number per key/value head."""

    keys: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Everything an artifact says about itself.

    Attributes
    ----------
    model, geometry
        The model and the attention of each of its layers.
    plan
        Codecs by name, the codecs of each layer, and what the cache keeps exact.
    relative_error
        One entry per layer, None where the layer stays dense.
    kernels
        Kernel configurations by name.
    sha256
        Content hash; empty until the artifact is saved.
    """

    model: ModelInfo
    geometry: tuple[LayerGeometry, ...]
    plan: CompressionPlan
    relative_error: tuple[LayerError | None, ...]
    calibration: CalibrationInfo
    recipe_sha256: str
    pqkv_version: str
    kernels: Mapping[str, KernelConfig] = field(default_factory=dict)
    sha256: str = ""


def canonical_json(document: object) -> str:
    """Return the one JSON text of `document`: sorted keys, no spaces, ASCII.

    Raises
    ------
    ValueError
        If it holds a number that is not finite.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
