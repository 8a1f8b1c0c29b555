"""The JSON text of a header to `Header`: canonical, of a known version, every law kept. No files, no tensors."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pqkv_cli.artifact.fields import MAX_COUNT, Node
from pqkv_cli.artifact.schema import (
    FORMAT,
    MAX_CODECS,
    MAX_GROUPS,
    MAX_STAGES,
    VERSION,
    CalibrationInfo,
    Header,
    KernelConfig,
    LayerError,
    ModelInfo,
    canonical_json,
)
from pqkv_cli.errors import ArtifactError, did_you_mean
from pqkv_cli.specs import SIDES, CacheSpec, CodecSpec, CompressionPlan, KeySpace, LayerGeometry, LayerPlan, MapKind, Side
from pqkv_kernels.format.layout import SUPPORTED_NBITS, CodeGroup, CodeLayout, RotaryLayout

_SHOWN_FAULTS = 20


def parse_document(text: str) -> dict[str, Any]:
    """Return the JSON object of a header, checked to be canonical and of a known version, its fields unread.

    Raises
    ------
    ArtifactError
        If `text` is not JSON, not canonical, or of another format or version.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        canonical = canonical_json(document)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ArtifactError(f"the header is not valid JSON ({reason}); copy the file again or export it again") from error
    if not isinstance(document, dict):
        raise ArtifactError("the header is not a JSON object; copy the file again or export it again")
    found = document.get("format")
    if found != FORMAT:
        raise ArtifactError(f"the header's format is {_short(found)}; expected {FORMAT!r}; give a file that pqkv export wrote")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"the format version is {_short(version)}; this pqkv reads version {VERSION}; "
            "use the pqkv that wrote the artifact, or export it again"
        )
    if canonical != text:
        raise ArtifactError(
            "the header is not canonical JSON (sorted keys, each once, no spaces, ASCII); export the artifact again"
        )
    return document


def listed(what: str, faults: list[str]) -> str:
    """Return one message for all `faults`, with what to do next."""
    lines = [f"  - {fault}" for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"  - and {len(faults) - _SHOWN_FAULTS} more")
    return "\n".join([f"{what}:", *lines, "export the artifact again"])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    shown = ascii(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    shown = str(value) if type(value) is int and abs(value) < 10**20 else shown
    return shown if len(shown) <= 40 else shown[:40] + "..."


def header_faults(header: Header) -> list[str]:
    """Return every broken law of `header`."""
    num_layers = len(header.geometry)
    faults = [
        f"{name} holds {found} layers; expected {num_layers}, as geometry has"
        for name, found in (("layers", len(header.plan.layers)), ("relative_error", len(header.relative_error)))
        if found != num_layers
    ]
    for index, geometry in enumerate(header.geometry):
        faults += _geometry_faults(index, geometry)
    if faults:
        return faults
    for index, layer in enumerate(header.plan.layers):
        faults += _layer_faults(header, index, layer)
    if all(layer.dense_reason for layer in header.plan.layers):
        faults.append("layers are all dense; expected at least one with codecs")
    return faults


def _geometry_faults(index: int, geometry: LayerGeometry) -> Iterator[str]:
    path = f"geometry[{index}]"
    if geometry.num_heads % geometry.num_kv_heads:
        yield f"{path} has {geometry.num_heads} heads; expected a multiple of its {geometry.num_kv_heads} key/value heads"
    if geometry.rotary is not None and geometry.rotary.rotary_dim > geometry.head_dim:
        yield f"{path}.rotary turns {geometry.rotary.rotary_dim} channels; expected at most head_dim {geometry.head_dim}"


def _layer_faults(header: Header, index: int, layer: LayerPlan) -> Iterator[str]:
    geometry, error = header.geometry[index], header.relative_error[index]
    if layer.dense_reason:
        if error is not None:
            yield f"relative_error[{index}] is given; expected null, the layer is dense"
        return
    if geometry.dense_reason:
        yield f"layers[{index}] has codecs; expected dense, its geometry says: {geometry.dense_reason}"
    if error is None:
        yield f"relative_error[{index}] is null; expected a number per head, the layer has codecs"
    for side in SIDES:
        path, name = f"layers[{index}].{side}", str(getattr(layer, side))
        codec = header.plan.codecs.get(name)
        if codec is None:
            yield f"{path}.store names the unknown codec {name!r}{did_you_mean(name[:100], header.plan.codecs)}"
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


_CODEC_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAPS: dict[str, MapKind] = {
    "identity": "identity",
    "pair_scale": "scale",
    "pair_metric": "blocks",
    "scale": "scale",
    "matrix": "matrix",
}
_KEY_SPACES: dict[object, KeySpace | None] = {None: None, "pre_rope": "pre_rope", "post_rope": "post_rope"}


def read_codec(name: str, node: Node) -> CodecSpec | None:
    """Return the codec at `node`, None where it has a fault."""
    num_faults = len(node.faults)
    if not _CODEC_NAME.fullmatch(name):
        node.fault("has a name that cannot be part of a tensor name; expected a-z, then a-z, 0-9, _ or -, at most 32 in all")
    kind, key_space, map_, stages = node.fields("kind", "key_space", "map", "stages")
    kind.choice(["pq"])
    space = None if key_space.value is None else key_space.choice(["pre_rope", "post_rope"])
    word = map_.choice(_MAPS)
    if (space == "pre_rope") != (word in ("pair_scale", "pair_metric")) and word in _MAPS and word != "identity":
        allowed = "identity, pair_scale or pair_metric" if space == "pre_rope" else "identity, scale or matrix"
        map_.fault(f"is {word!r}; expected {allowed} with key_space {space or 'null'}")
    rows = [_stage(stage) for stage in stages.items()]
    if not 1 <= len(rows) <= MAX_STAGES:
        stages.fault(f"holds {len(rows)} stages; expected 1 to {MAX_STAGES}")
    widths = sorted({sum(group.num_channels for group in row) for row in rows})
    if len(widths) > 1 and len(node.faults) == num_faults:
        stages.fault(f"cover {widths} channels; expected the same number in each stage")
    if len(node.faults) > num_faults:
        return None
    return CodecSpec(CodeLayout(tuple(rows)), _MAPS[str(word)], _KEY_SPACES[space])


def _stage(node: Node) -> tuple[CodeGroup, ...]:
    (groups,) = node.fields("groups")
    items = groups.items()
    if not 1 <= len(items) <= MAX_GROUPS:
        groups.fault(f"holds {len(items)} groups; expected 1 to {MAX_GROUPS} (each compiles its own kernel)")
    row: list[CodeGroup] = []
    for item in items:
        group = _group(item, sum(group.num_channels for group in row))
        if group is not None:
            row.append(group)
    return tuple(row)


def _group(node: Node, first_channel: int) -> CodeGroup | None:
    num_faults = len(node.faults)
    count, nbits, dims = node.fields("M", "nbits", "dims")
    num_subspaces, bits = count.integer(1, MAX_COUNT), nbits.choice(SUPPORTED_NBITS)
    subspaces = [[channel.integer(0, MAX_COUNT) for channel in subspace.items()] for subspace in dims.items()]
    if len(node.faults) > num_faults:
        return None
    widths = {len(subspace) for subspace in subspaces}
    if len(subspaces) != num_subspaces or len(widths) != 1 or 0 in widths:
        dims.fault(f"holds {len(subspaces)} subspaces of {sorted(widths)} channels; expected M = {num_subspaces} of equal size")
        return None
    for expected, channel in enumerate((c for subspace in subspaces for c in subspace), start=first_channel):
        if channel != expected:
            found = f"names channel {channel} where {expected} is due"
            dims.fault(f"{found}; version 1 covers the permuted channels 0, 1, 2, ... in order")
            return None
    return CodeGroup(num_subspaces, int(bits or 0), widths.pop())


def parse_header(document: dict[str, Any]) -> Header:
    """Return the header that `document` describes.

    Raises
    ------
    ArtifactError
        With all faults at once, each with its path.
    """
    faults: list[str] = []
    header = _header(Node(document, "", faults))
    if not faults and header is not None:
        faults = header_faults(header)
    if faults or header is None:
        raise ArtifactError(listed("the header is not valid", faults))
    return header


def _header(root: Node) -> Header | None:
    names = ("format", "version", "model", "geometry", "codecs", "layers", "cache", "kernels", "relative_error")
    nodes = root.fields(*names, "recipe_sha256", "calibration", "pqkv_version", "sha256")
    _, _, model, geometry, codecs, layers, cache, kernels, errors, recipe, calibration, version, sha256 = nodes
    layer_geometries = tuple(_geometry(node) for node in geometry.items())
    specs = {name: read_codec(name, node) for name, node in codecs.members().items()}
    if len(specs) > MAX_CODECS:
        codecs.fault(f"holds {len(specs)} codecs; expected at most {MAX_CODECS} (each compiles its own kernel)")
    header = Header(
        model=_model(model, len(layer_geometries)),
        geometry=layer_geometries,
        plan=CompressionPlan(
            {name: spec for name, spec in specs.items() if spec is not None},
            tuple(_layer(node) for node in layers.items()),
            _cache(cache),
        ),
        relative_error=tuple(_error(node) for node in errors.items()),
        calibration=_calibration(calibration),
        recipe_sha256=recipe.sha256(),
        pqkv_version=version.text(),
        kernels={name: _kernel(node) for name, node in kernels.members().items()},
        sha256=sha256.sha256(empty=True),
    )
    return None if root.faults else header


def _model(node: Node, num_layers: int) -> ModelInfo:
    label, model_type, config, weights, count = node.fields(
        "label", "model_type", "config_sha256", "weights_sha256", "num_layers"
    )
    if count.integer(1, MAX_COUNT) != num_layers:
        count.fault(f"is not the number of layers in geometry, {num_layers}")
    return ModelInfo(label.text(), model_type.text(), config.sha256(), weights.sha256())


def _geometry(node: Node) -> LayerGeometry:
    num_heads, num_kv_heads, head_dim, rotary, reason = node.fields(
        "num_heads", "num_kv_heads", "head_dim", "rotary", "dense_reason"
    )
    return LayerGeometry(
        num_heads.integer(1, MAX_COUNT),
        num_kv_heads.integer(1, MAX_COUNT),
        head_dim.integer(1, MAX_COUNT),
        _rotary(rotary),
        reason.text(empty=True),
    )


def _rotary(node: Node) -> RotaryLayout | None:
    if node.value is None:
        return None
    rotary_dim, interleaved = node.fields("rotary_dim", "interleaved")
    channels = rotary_dim.integer(2, MAX_COUNT)
    if channels % 2:
        rotary_dim.expected("an even number")
        channels = 2
    return RotaryLayout(channels, interleaved.boolean())


def _layer(node: Node) -> LayerPlan:
    if isinstance(node.value, dict) and "dense" in node.value:
        (reason,) = node.fields("dense")
        return LayerPlan(dense_reason=reason.text())
    keys, values = node.fields("keys", "values")
    return LayerPlan(_stored(keys), _stored(values))


def _stored(node: Node) -> str:
    (store,) = node.fields("store")
    names = [item.text() for item in store.items()]
    if isinstance(store.value, list) and len(names) != 1:
        store.fault(f"names {len(names)} codecs; version 1 stores exactly one")
    return names[0] if names else "?"


def _cache(node: Node) -> CacheSpec:
    num_sinks, window_tokens = node.fields("num_sinks", "window_tokens")
    return CacheSpec(num_sinks.integer(0, 2**31 - 1), window_tokens.integer(0, 2**31 - 1))


def _error(node: Node) -> LayerError | None:
    if node.value is None:
        return None
    keys, values = node.fields("keys", "values")
    return LayerError(tuple(e.number() for e in keys.items()), tuple(e.number() for e in values.items()))


def _calibration(node: Node) -> CalibrationInfo:
    data, *counts = node.fields("data_sha256", "num_samples", "num_held_out", "seq_len", "reservoir_size", "seed")
    return CalibrationInfo(data.sha256(), *(count.integer() for count in counts))


def _kernel(node: Node) -> KernelConfig:
    config: dict[str, int | str | bool] = {}
    for name, item in node.members().items():
        if isinstance(item.value, bool):
            config[name] = item.value
        elif isinstance(item.value, str):
            config[name] = item.text()
        else:
            config[name] = item.integer()
    return config
