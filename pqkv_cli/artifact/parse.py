"""JSON text to `Header`, refusing whatever the format does not know. Knows no files and no tensors."""

from typing import Any

from pqkv_cli.artifact.codecs import read_codec
from pqkv_cli.artifact.document import listed
from pqkv_cli.artifact.fields import MAX_COUNT, Node
from pqkv_cli.artifact.laws import header_faults
from pqkv_cli.artifact.schema import MAX_CODECS, CalibrationInfo, Header, KernelConfig, LayerError, ModelInfo
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import CacheSpec, CompressionPlan, LayerGeometry, LayerPlan
from pqkv_kernels.layout import RotaryLayout


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
