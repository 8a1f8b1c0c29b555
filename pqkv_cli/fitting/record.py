"""What a finished fit says about itself, `fit.json`. Knows JSON and plans; no tensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.errors import PqkvError, RunError, did_you_mean
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.specs import CODEC_MAPS, SIDES, CacheSpec, CodecSpec, CompressionPlan, LayerPlan, Side
from pqkv_kernels.format.layout import CodeGroup, CodeLayout

SCHEMA = "pqkv.fit/1"
RECORD_NAME = "fit.json"


@dataclass(frozen=True, slots=True)
class FitRecord:
    """A finished fit.

    Attributes
    ----------
    request_sha256
        Hash of everything the codebooks depend on; equal requests give equal bytes.
    plan, settings
        What was fitted and how.
    relative_error
        Per layer and side one number per KV head; empty mappings for dense layers.
    layers_sha256
        Content hash of each layer's tensors.
    """

    request_sha256: str
    plan: CompressionPlan
    settings: FitSettings
    relative_error: tuple[Mapping[Side, tuple[float, ...]], ...]
    layers_sha256: tuple[str, ...]

    def text(self) -> str:
        """Return the record as JSON for people and programs."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, indent=1, allow_nan=False) + "\n"


def codec_facts(spec: CodecSpec) -> dict[str, Any]:
    """Return what a codec is, for hashes: of a codec that predicts nothing, what was said of it before there were others."""
    facts = asdict(spec)
    if not spec.predicted:
        del facts["predicted"]
    return facts


def digest(document: object) -> str:
    """Return the sha256 of a JSON document in canonical form."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_document(path: Path, schema: str, advice: str) -> dict[str, Any] | None:
    """Return the JSON object of `schema` in the file `path`, None where there is no file; `advice` ends every error.

    Raises
    ------
    RunError
        If it cannot be read, or has another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); expected JSON; {advice}") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        stated = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise RunError(f"{path} has schema {stated!r}; expected {schema!r}; {advice}")
    return document


def load_record(directory: Path) -> FitRecord:
    """Read `fit.json`.

    Raises
    ------
    RunError
        If the fit is missing, incomplete or damaged.
    """
    path = directory / RECORD_NAME
    advice = "run pqkv fit-codebooks on this run; finished layers are kept"
    document = read_document(path, SCHEMA, advice)
    if document is None:
        state = "an unfinished fit" if any(directory.glob("layer_*.safetensors")) else "no fitted codebooks"
        raise RunError(f"{directory} holds {state}; expected {RECORD_NAME}; {advice}")
    try:
        record = _record(document)
        _check_names(record)
        return record
    except (KeyError, TypeError, ValueError, AttributeError, PqkvError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); expected a complete record; {advice}") from error


def _record(document: Mapping[str, Any]) -> FitRecord:
    plan = document["plan"]
    return FitRecord(
        str(document["request_sha256"]),
        CompressionPlan(
            {name: _codec(codec) for name, codec in plan["codecs"].items()},
            tuple(LayerPlan(**layer) for layer in plan["layers"]),
            CacheSpec(**plan["cache"]),
        ),
        FitSettings(**document["settings"]),
        tuple({side: tuple(errors) for side, errors in layer.items()} for layer in document["relative_error"]),
        tuple(map(str, document["layers_sha256"])),
    )


def _check_names(record: FitRecord) -> None:
    """Raise ValueError or KeyError where layers are not all there, or name codecs or maps that are not."""
    counts = {len(part) for part in (record.plan.layers, record.relative_error, record.layers_sha256)}
    if len(counts) > 1:
        raise ValueError(f"it tells of {' and of '.join(map(str, sorted(counts)))} layers")
    for index, layer in enumerate(record.plan.layers):
        if not all(isinstance(name, str) for name in (layer.keys, layer.values, layer.dense_reason)):
            raise TypeError(f"layer {index} is not described by names")
        for side in SIDES:
            record.plan.codec(index, side)
    for name, spec in record.plan.codecs.items():
        if spec.map not in CODEC_MAPS:
            raise ValueError(f"codec {name} has the unknown map {spec.map!r}{did_you_mean(str(spec.map), CODEC_MAPS)}")


def _codec(document: Mapping[str, Any]) -> CodecSpec:
    stages = document["layout"]["stages"]
    layout = CodeLayout(tuple(tuple(CodeGroup(**group) for group in stage) for stage in stages))
    # Records from before values were predicted do not say so.
    return CodecSpec(layout, document["map"], document["key_space"], bool(document.get("predicted", False)))
