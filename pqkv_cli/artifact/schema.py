"""The header of an artifact as frozen data, and its canonical JSON. Knows no files and no tensors.

Parsing lives in `pqkv_cli.artifact.header`, the laws between fields in `pqkv_cli.artifact.header`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pqkv_cli.specs import CodecSpec, CompressionPlan, LayerGeometry, LayerPlan
from pqkv_kernels.format.layout import CodeGroup

FORMAT = "pqkv"
VERSION = 1
# What an artifact is called in its directory.
ARTIFACT_FILE = "pqkv.safetensors"
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


def header_document(header: Header) -> dict[str, Any]:
    """Return `header` as a JSON document (see docs/artifact-format.md)."""
    model, calibration, cache = header.model, header.calibration, header.plan.cache
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "label": model.label,
            "model_type": model.model_type,
            "config_sha256": model.config_sha256,
            "weights_sha256": model.weights_sha256,
            "num_layers": len(header.geometry),
        },
        "geometry": [_geometry_document(layer) for layer in header.geometry],
        "codecs": {name: _codec_document(codec) for name, codec in header.plan.codecs.items()},
        "layers": [_layer_document(layer) for layer in header.plan.layers],
        "cache": {"num_sinks": cache.num_sinks, "window_tokens": cache.window_tokens},
        "kernels": {name: dict(config) for name, config in header.kernels.items()},
        "relative_error": [
            None if error is None else {"keys": list(error.keys), "values": list(error.values)}
            for error in header.relative_error
        ],
        "recipe_sha256": header.recipe_sha256,
        "calibration": {
            "data_sha256": calibration.data_sha256,
            "num_samples": calibration.num_samples,
            "num_held_out": calibration.num_held_out,
            "seq_len": calibration.seq_len,
            "reservoir_size": calibration.reservoir_size,
            "seed": calibration.seed,
        },
        "pqkv_version": header.pqkv_version,
        "sha256": header.sha256,
    }


def map_word(codec: CodecSpec) -> str:
    """Return the word the format uses for the transform of `codec`."""
    words = {"blocks": "pair_metric", "scale": "pair_scale" if codec.key_space == "pre_rope" else "scale"}
    return words.get(codec.map, codec.map)


def _geometry_document(layer: LayerGeometry) -> dict[str, Any]:
    rotary = layer.rotary
    return {
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rotary": None if rotary is None else {"rotary_dim": rotary.rotary_dim, "interleaved": rotary.interleaved},
        "dense_reason": layer.dense_reason,
    }


def _codec_document(codec: CodecSpec) -> dict[str, Any]:
    stages = []
    for stage in codec.layout.stages:
        groups, channel = [], 0
        for group in stage:
            groups.append(_group_document(group, channel))
            channel += group.num_channels
        stages.append({"groups": groups})
    return {"kind": "pq", "key_space": codec.key_space, "map": map_word(codec), "stages": stages}


def _group_document(group: CodeGroup, first_channel: int) -> dict[str, Any]:
    starts = range(first_channel, first_channel + group.num_channels, group.subspace_dim)
    dims = [list(range(start, start + group.subspace_dim)) for start in starts]
    return {"M": group.num_subspaces, "nbits": group.nbits, "dims": dims}


def _layer_document(layer: LayerPlan) -> dict[str, Any]:
    if layer.dense_reason:
        return {"dense": layer.dense_reason}
    return {"keys": {"store": [layer.keys]}, "values": {"store": [layer.values]}}
