"""A `Header` from its JSON document and back. Knows no files and no tensors.

The classes are the parts of the document as they stand in the file (docs/artifact-format.md). The functions that turn them into
parts of a `Header` keep the laws within a part; the laws between parts follow where a header is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, Strict, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from pqkv_cli.artifact.faults import listed, refusal, shown
from pqkv_cli.artifact.schema import (
    FORMAT,
    MAX_CODECS,
    MAX_GROUPS,
    MAX_STAGES,
    VERSION,
    CalibrationInfo,
    Header,
    LayerError,
    ModelInfo,
    canonical_json,
)
from pqkv_cli.errors import ArtifactError, did_you_mean
from pqkv_cli.specs import SIDES, CacheSpec, CodecSpec, CompressionPlan, KeySpace, LayerGeometry, LayerPlan, MapKind, Side
from pqkv_kernels.format.layout import SUPPORTED_NBITS, CodeGroup, CodeLayout, RotaryLayout

T = TypeVar("T")
MAX_COUNT = 2**15 - 1  # channels are numbered by int16
# Far more than the largest model needs, and too few for the faults of a hostile header to fill the memory.
MAX_COMMAS = 2**16


def _other_than(what: str) -> PydanticCustomError:
    return PydanticCustomError("expected", "{what}", {"what": what})


def _expected(what: str) -> WrapValidator:
    """Say that `what` was expected, whichever rule of its type a value breaks."""

    def check(value: object, rules: Callable[[object], object]) -> object:
        try:
            return rules(value)
        except ValidationError:
            raise _other_than(what) from None

    return WrapValidator(check)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError
    return text


Array = Annotated[tuple[T, ...], Strict(False)]  # JSON has arrays where we have tuples; all else is strict
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Channel = Annotated[int, Field(ge=0, le=MAX_COUNT)]
NumTokens = Annotated[int, Field(ge=0, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**53 - 1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False), _expected("a finite number of at least 0")]
Printable = Annotated[str, AfterValidator(_printable), _expected("a string of printable characters")]
Text = Annotated[Printable, Field(min_length=1), _expected("a string of printable characters, not empty")]
_SHA256 = "a SHA-256 of 64 lower-case hexadecimal digits"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$"), _expected(_SHA256)]
Name = Annotated[
    str, Field(pattern="^[a-z][a-z0-9_-]{0,31}$"), _expected("a name of a-z, then a-z, 0-9, _ or -, at most 32 in all")
]
KernelSetting = Annotated[bool | Natural | Text, _expected("an integer from 0, a printable string, true or false")]


class _Part(BaseModel):
    # No name is protected: `model_type` is a field of the format.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def _read(part: type[_Part], make: Callable[..., object]) -> PlainValidator:
    """Read an object by the fields of `part`, and keep what `make` makes of them."""

    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise _other_than(f"an object with the fields {', '.join(part.model_fields)}")
        return make(**vars(part.model_validate(value)))

    return PlainValidator(read)


class _Rotary(_Part):
    rotary_dim: Count
    interleaved: bool


class _Geometry(_Part):
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rotary: Annotated[RotaryLayout, _read(_Rotary, RotaryLayout)] | None
    dense_reason: Printable


def _geometry(**fields: Any) -> LayerGeometry:
    layer = LayerGeometry(**fields)
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(f"{layer.num_heads} heads; expected a multiple of its {layer.num_kv_heads} key/value heads")
    if layer.rotary is not None and layer.rotary.rotary_dim > layer.head_dim:
        raise ValueError(f"rotary_dim is {layer.rotary.rotary_dim}; expected at most head_dim {layer.head_dim}")
    return layer


class _Group(_Part):
    M: Count
    nbits: Annotated[int, Field(ge=min(SUPPORTED_NBITS), le=max(SUPPORTED_NBITS))]
    dims: Array[Array[Channel]]


class _Stage(_Part):
    groups: Annotated[Array[_Group], Field(min_length=1, max_length=MAX_GROUPS)]


def _stage(groups: Sequence[_Group]) -> tuple[CodeGroup, ...]:
    due = 0
    for index, group in enumerate(groups):
        sizes = sorted({len(subspace) for subspace in group.dims})
        if len(group.dims) != group.M or len(sizes) != 1 or 0 in sizes:
            found = f"groups[{index}].dims holds {len(group.dims)} subspaces of {sizes[:5]} channels"
            raise ValueError(f"{found}; expected M = {group.M} of equal size")
        for channel in (channel for subspace in group.dims for channel in subspace):
            if channel != due:
                found = f"groups[{index}].dims names channel {channel} where {due} is due"
                raise ValueError(f"{found}; version 1 covers the permuted channels 0, 1, 2, ... in order")
            due += 1
    return tuple(CodeGroup(group.M, group.nbits, len(group.dims[0])) for group in groups)


class _Codec(_Part):
    kind: Literal["pq"]
    key_space: KeySpace | None
    map: Text
    predicted: bool = False
    stages: Annotated[
        Array[Annotated[tuple[CodeGroup, ...], _read(_Stage, _stage)]], Field(min_length=1, max_length=MAX_STAGES)
    ]


# What the format calls the transforms of keys before RoPE, and those of other keys and of values.
_PAIR_MAPS: Mapping[str, MapKind] = {"identity": "identity", "pair_scale": "scale", "pair_metric": "blocks"}
_PLAIN_MAPS: Mapping[str, MapKind] = {"identity": "identity", "scale": "scale", "matrix": "matrix"}


def map_word(codec: CodecSpec) -> str:
    """Return the word the format uses for the transform of `codec`."""
    maps = _PAIR_MAPS if codec.key_space == "pre_rope" else _PLAIN_MAPS
    return next((word for word, kind in maps.items() if kind == codec.map), codec.map)


def _codec(
    kind: str, key_space: KeySpace | None, map: str, predicted: bool, stages: tuple[tuple[CodeGroup, ...], ...]
) -> CodecSpec:
    maps = _PAIR_MAPS if key_space == "pre_rope" else _PLAIN_MAPS
    if map not in maps:
        expected = f"one of {', '.join(maps)} with key_space {key_space or 'null'}"
        raise ValueError(f"map is {shown(map)}{did_you_mean(map[:100], maps)}; expected {expected}")
    if predicted and key_space is not None:
        raise ValueError(f"predicted is true with key_space {key_space}; expected only values to be predicted")
    return CodecSpec(CodeLayout(stages), maps[map], key_space, predicted)


class _Store(_Part):
    # Version 1 stores the codes of exactly one codec.
    store: Annotated[Array[Text], Field(min_length=1, max_length=1)]


class _CodedLayer(_Part):
    keys: _Store
    values: _Store


class _DenseLayer(_Part):
    dense: Text


def _layer(value: object) -> LayerPlan:
    if isinstance(value, dict) and "dense" in value:
        return LayerPlan(dense_reason=_DenseLayer.model_validate(value).dense)
    layer = _CodedLayer.model_validate(value)
    return LayerPlan(layer.keys.store[0], layer.values.store[0])


class _Cache(_Part):
    num_sinks: NumTokens
    window_tokens: NumTokens


class _Error(_Part):
    keys: Array[Number]
    values: Array[Number]


class _Calibration(_Part):
    data_sha256: Sha256
    num_samples: Natural
    num_held_out: Natural
    seq_len: Natural
    reservoir_size: Natural
    seed: Natural


class _Model(_Part):
    label: Text
    model_type: Text
    config_sha256: Sha256
    weights_sha256: Sha256
    num_layers: Count


class _Document(_Part):
    format: Literal["pqkv"]
    version: Literal[1]
    model: _Model
    geometry: Array[Annotated[LayerGeometry, _read(_Geometry, _geometry)]]
    codecs: Annotated[dict[Name, Annotated[CodecSpec, _read(_Codec, _codec)]], Field(max_length=MAX_CODECS)]
    layers: Array[Annotated[LayerPlan, PlainValidator(_layer)]]
    cache: Annotated[CacheSpec, _read(_Cache, CacheSpec)]
    kernels: dict[str, dict[str, KernelSetting]]
    relative_error: Array[Annotated[LayerError, _read(_Error, LayerError)] | None]
    recipe_sha256: Sha256
    calibration: Annotated[CalibrationInfo, _read(_Calibration, CalibrationInfo)]
    pqkv_version: Text
    sha256: Annotated[Sha256 | Literal[""], _expected(_SHA256)]  # empty until it has been computed


def _header(document: _Document) -> Header:
    return Header(
        model=ModelInfo(**document.model.model_dump(exclude={"num_layers"})),
        geometry=document.geometry,
        plan=CompressionPlan(document.codecs, document.layers, document.cache),
        relative_error=document.relative_error,
        calibration=document.calibration,
        recipe_sha256=document.recipe_sha256,
        pqkv_version=document.pqkv_version,
        kernels=document.kernels,
        sha256=document.sha256,
    )


def parse_document(text: str) -> dict[str, Any]:
    """Return the JSON object of a header, checked to be canonical and of a known version, its fields unread.

    Raises
    ------
    ArtifactError
        If `text` is not JSON, not canonical, or of another format or version.
    """
    if text.count(",") > MAX_COMMAS:
        raise ArtifactError(f"the header has more than {MAX_COMMAS} values; give a file that pqkv export wrote")
    try:
        document = json.loads(text)
        canonical = canonical_json(document)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ArtifactError(f"the header is not valid JSON ({reason}); copy the file again or export it again") from error
    if not isinstance(document, dict):
        raise ArtifactError("the header is not a JSON object; copy the file again or export it again")
    found = document.get("format")
    if found != FORMAT:
        raise ArtifactError(f"the format is {shown(found)}; expected {FORMAT!r}; give a file that pqkv export wrote")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"the format version is {shown(version)}; this pqkv reads version {VERSION}; "
            "use the pqkv that wrote the artifact, or export it again"
        )
    if canonical != text:
        raise ArtifactError(
            "the header is not canonical JSON (sorted keys, each once, no spaces, ASCII); export the artifact again"
        )
    return document


def parse_header(document: dict[str, Any]) -> Header:
    """Return the header that `document` describes.

    Raises
    ------
    ArtifactError
        With all faults at once, each with its path.
    """
    try:
        read = _Document.model_validate(document)
    except ValidationError as error:
        raise ArtifactError(refusal(error)) from error
    header = _header(read)
    faults = [*_layer_count_faults(read)] or [*_layer_faults(header)]
    if faults:
        raise ArtifactError(listed("the header is not valid", faults))
    return header


def _layer_count_faults(document: _Document) -> Iterator[str]:
    expected = len(document.geometry)
    if document.model.num_layers != expected:
        yield f"model.num_layers is {document.model.num_layers}; expected {expected}, as geometry has"
    for name, layers in (("layers", document.layers), ("relative_error", document.relative_error)):
        if len(layers) != expected:
            yield f"{name} holds {len(layers)} layers; expected {expected}, as geometry has"


def _layer_faults(header: Header) -> Iterator[str]:
    for index, layer in enumerate(header.plan.layers):
        if layer.dense_reason:
            if header.relative_error[index] is not None:
                yield f"relative_error[{index}] is given; expected null, the layer is dense"
        else:
            yield from _coded_layer_faults(header, index, layer)
    if all(layer.dense_reason for layer in header.plan.layers):
        yield "layers are all dense; expected at least one with codecs"


def _coded_layer_faults(header: Header, index: int, layer: LayerPlan) -> Iterator[str]:
    geometry, error = header.geometry[index], header.relative_error[index]
    if geometry.dense_reason:
        yield f"layers[{index}] has codecs; expected dense, its geometry says {shown(geometry.dense_reason)}"
    if error is None:
        yield f"relative_error[{index}] is null; expected a number per head, the layer has codecs"
    for side in SIDES:
        path, name = f"layers[{index}].{side}", str(getattr(layer, side))
        codec = header.plan.codecs.get(name)
        if codec is None:
            yield f"{path}.store names the unknown codec {shown(name)}{did_you_mean(name[:100], header.plan.codecs)}"
        else:
            yield from _codec_faults(path, side, name, codec, geometry)
        if error is not None and len(getattr(error, side)) != geometry.num_kv_heads:
            found, expected = len(getattr(error, side)), geometry.num_kv_heads
            yield f"relative_error[{index}].{side} holds {found} numbers; expected one per key/value head, {expected}"


def _codec_faults(path: str, side: Side, name: str, codec: CodecSpec, geometry: LayerGeometry) -> Iterator[str]:
    if codec.layout.head_dim != geometry.head_dim:
        yield f"{path} uses codec {name}, which covers {codec.layout.head_dim} channels; expected head_dim {geometry.head_dim}"
    if (side == "keys") != (codec.key_space is not None):
        wanted = "a key_space for keys" if side == "keys" else "key_space null for values"
        yield f"{path} uses codec {name} with key_space {codec.key_space or 'null'}; expected {wanted}"
    unrotated = geometry.head_dim - geometry.rotary.rotary_dim if geometry.rotary is not None else 0
    if codec.map == "blocks" and unrotated % 2:
        yield f"{path} uses codec {name} with pair_metric, but {unrotated} unrotated channels form no pairs"
    if codec.key_space == "pre_rope" and geometry.rotary is None:
        yield f"{path} uses codec {name} with key_space pre_rope, but the layer has no rotary embedding; expected post_rope"


def header_document(header: Header) -> dict[str, Any]:
    """Return `header` as a JSON document (see docs/artifact-format.md), its parts under the names of their fields."""
    plan = header.plan
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {**asdict(header.model), "num_layers": len(header.geometry)},
        "geometry": [asdict(layer) for layer in header.geometry],
        "codecs": {name: _codec_document(codec) for name, codec in plan.codecs.items()},
        "layers": [_layer_document(layer) for layer in plan.layers],
        "cache": asdict(plan.cache),
        "kernels": {name: dict(config) for name, config in header.kernels.items()},
        "relative_error": [error and asdict(error) for error in header.relative_error],
        "recipe_sha256": header.recipe_sha256,
        "calibration": asdict(header.calibration),
        "pqkv_version": header.pqkv_version,
        "sha256": header.sha256,
    }


def _codec_document(codec: CodecSpec) -> dict[str, Any]:
    stages: list[dict[str, Any]] = [{"groups": []} for _ in codec.layout.stages]
    for stage, _, group, _, channel in codec.layout.spans():
        starts = range(channel, channel + group.num_channels, group.subspace_dim)
        dims = [list(range(start, start + group.subspace_dim)) for start in starts]
        stages[stage]["groups"].append({"M": group.num_subspaces, "nbits": group.nbits, "dims": dims})
    # Left out where nothing is predicted, as in all artifacts from before values were.
    predicted = {"predicted": True} if codec.predicted else {}
    return {"kind": "pq", "key_space": codec.key_space, "map": map_word(codec), **predicted, "stages": stages}


def _layer_document(layer: LayerPlan) -> dict[str, Any]:
    if layer.dense_reason:
        return {"dense": layer.dense_reason}
    return {"keys": {"store": [layer.keys]}, "values": {"store": [layer.values]}}
