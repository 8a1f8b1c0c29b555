"""Plans made without looking at data: the same rate everywhere. Knows geometry and rates; no torch, no files."""

from pqkv_cli.errors import UsageError
from pqkv_cli.rates import USUAL_PROTOTYPE_NBITS, key_layout, rate_layout
from pqkv_cli.specs import (
    CacheSpec,
    CodecSpec,
    CompressionPlan,
    LayerGeometry,
    LayerPlan,
    MapKind,
    ModelGeometry,
)


def uniform_plan(
    geometry: ModelGeometry, bits: float, cache: CacheSpec, prototype_bits: int = USUAL_PROTOTYPE_NBITS
) -> CompressionPlan:
    """Return a plan that codes every layer that can be at `bits` per channel.

    Keys of rotary layers are coded before rotary embedding in the metric of each pair, other keys as they are; values in
    the metric of the output projection. A code of `prototype_bits` for the whole vector comes first (0: none) where vectors
    are long enough for it. Codecs are named ``k4`` and ``v4``, and ``k4_d128`` where layers differ in width.

    Raises
    ------
    UsageError
        If the rate is unknown, does not fit a head_dim, or no layer can be coded.
    """
    codecs: dict[str, CodecSpec] = {}
    layers = []
    kinds = [(layer.head_dim, layer.rotary is not None) for layer in geometry.layers if not layer.dense_reason]
    if not kinds:
        reasons = sorted({layer.dense_reason for layer in geometry.layers})
        raise UsageError(
            f"none of the {len(geometry.layers)} layers of this {geometry.model_type} model can be quantized "
            f"({'; '.join(reasons)}); expected at least one with a plain key/value cache; choose another model"
        )
    for layer in geometry.layers:
        if layer.dense_reason:
            layers.append(LayerPlan(dense_reason=layer.dense_reason))
            continue
        layout = rate_layout(bits, layer.head_dim, prototype_bits)
        keys, values = _names(layer, bits, kinds)
        if layer.rotary is not None:
            codecs.setdefault(keys, CodecSpec(key_layout(bits, layer.head_dim, prototype_bits), _key_map(layer), "pre_rope"))
        else:
            codecs.setdefault(keys, CodecSpec(layout, "identity", "post_rope"))
        codecs.setdefault(values, CodecSpec(layout, "matrix"))
        layers.append(LayerPlan(keys, values))
    return CompressionPlan(codecs, tuple(layers), cache)


def _key_map(layer: LayerGeometry) -> MapKind:
    # Blocks cover all channels in twos; one channel left over outside the rotary pairs leaves only a scale.
    return "scale" if layer.head_dim % 2 else "blocks"


def _names(layer: LayerGeometry, bits: float, kinds: list[tuple[int, bool]]) -> tuple[str, str]:
    """Return the codec names of a layer; suffixes appear only where layers of the model differ."""
    width = f"_d{layer.head_dim}" if len({dim for dim, _ in kinds}) > 1 else ""
    unrotated = "_nope" if layer.rotary is None and any(rotary for _, rotary in kinds) else ""
    rate = f"{bits:g}".replace(".", "_")
    return f"k{rate}{width}{unrotated}", f"v{rate}{width}"
