"""The laws between the fields of a header. Knows no JSON, no files and no tensors."""

from collections.abc import Iterator

from pqkv_cli.artifact.schema import Header
from pqkv_cli.errors import did_you_mean
from pqkv_cli.specs import SIDES, CodecSpec, LayerGeometry, LayerPlan, Side


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
