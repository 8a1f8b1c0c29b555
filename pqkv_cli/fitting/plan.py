"""Plans: which format codes which side of which layer, at what rate. Knows geometry and rates; no data, no torch, no files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pqkv_cli.errors import UsageError
from pqkv_cli.rates import USUAL_STYLE, CodeStyle, key_layout, rate_layout
from pqkv_cli.specs import (
    SIDES,
    CacheSpec,
    CodecSpec,
    CompressionPlan,
    KeySpace,
    LayerGeometry,
    LayerPlan,
    MapKind,
    ModelGeometry,
    Side,
)

# Where keys of rotary layers are coded, by layer; before rotary embedding where a layer is not named.
KeySpaces = Mapping[int, KeySpace]


def uniform_plan(
    geometry: ModelGeometry,
    bits: float,
    cache: CacheSpec,
    style: CodeStyle = USUAL_STYLE,
    key_spaces: KeySpaces = MappingProxyType({}),
) -> CompressionPlan:
    """Return a plan that codes every layer that can be at `bits` per channel; see `rated_plan`.

    Raises
    ------
    UsageError
        If the rate is unknown, does not fit a head_dim, or no layer can be coded.
    """
    return rated_plan(geometry, lambda index, side: bits, cache, style, key_spaces)


def rated_plan(
    geometry: ModelGeometry,
    rate: Callable[[int, Side], float],
    cache: CacheSpec,
    style: CodeStyle = USUAL_STYLE,
    key_spaces: KeySpaces = MappingProxyType({}),
) -> CompressionPlan:
    """Return a plan that codes every layer that can be, each side at its own of the known rates.

    Keys of rotary layers are coded before rotary embedding in the metric of each pair, unless `key_spaces` says otherwise;
    other keys in the metric of their queries; values in the metric of the output projection. Codecs are named ``k4`` and
    ``v4``, ``k4_d128`` where layers differ in width, and ``k4_post`` where keys are coded after a rotary embedding.

    Raises
    ------
    UsageError
        If a rate is unknown or does not fit a head_dim, or no layer can be coded.
    """
    codecs: dict[str, CodecSpec] = {}
    layers = []
    check_codable(geometry)
    for index, layer in enumerate(geometry.layers):
        if layer.dense_reason:
            layers.append(LayerPlan(dense_reason=layer.dense_reason))
            continue
        names: dict[Side, str] = {}
        for side in SIDES:
            bits = rate(index, side)
            space = key_spaces.get(index, "pre_rope")
            names[side] = codec_name(geometry, index, side, bits, space)
            codecs.setdefault(names[side], side_spec(layer, side, bits, style, space))
        layers.append(LayerPlan(names["keys"], names["values"]))
    return CompressionPlan(codecs, tuple(layers), cache)


def check_codable(geometry: ModelGeometry) -> None:
    """Refuse a model of which nothing can be quantized.

    Raises
    ------
    UsageError
        With the reasons why.
    """
    reasons = [layer.dense_reason for layer in geometry.layers]
    if all(reasons):
        raise UsageError(
            f"none of the {len(reasons)} layers of this {geometry.model_type} model can be quantized "
            f"({'; '.join(sorted(set(reasons)))}); expected at least one with a plain key/value cache; choose another model"
        )


def side_spec(layer: LayerGeometry, side: Side, bits: float, style: CodeStyle, space: KeySpace = "pre_rope") -> CodecSpec:
    """Return the format of one side of a layer at `bits` per channel; keys that can be are coded in `space`.

    Raises
    ------
    UsageError
        If the rate is unknown or does not fit the head_dim.
    """
    if side == "values":
        return CodecSpec(rate_layout(bits, layer.head_dim, style), "matrix")
    if layer.rotary is None or space == "post_rope":
        return CodecSpec(rate_layout(bits, layer.head_dim, style), "matrix", "post_rope")
    return CodecSpec(key_layout(bits, layer.head_dim, style), _key_map(layer), "pre_rope")


def rated_specs(layer: LayerGeometry, side: Side, style: CodeStyle, space: KeySpace = "pre_rope") -> Mapping[float, CodecSpec]:
    """Return the format of one side of a layer at every rate that fits it, from the lowest."""
    specs = {}
    for bits in sorted(style.rates):
        try:
            specs[bits] = side_spec(layer, side, bits, style, space)
        except UsageError:
            continue
    return specs


def codec_name(geometry: ModelGeometry, index: int, side: Side, bits: float, space: KeySpace = "pre_rope") -> str:
    """Return the name of a layer's codec; suffixes appear only where layers of the model differ."""
    layer = geometry.layers[index]
    coded = [other for other in geometry.layers if not other.dense_reason]
    rate = f"{bits:g}".replace(".", "_")
    width = f"_d{layer.head_dim}" if len({other.head_dim for other in coded}) > 1 else ""
    if side == "values":
        return f"v{rate}{width}"
    if layer.rotary is not None:
        return f"k{rate}{width}" + ("_post" if space == "post_rope" else "")
    return f"k{rate}{width}" + ("_nope" if any(other.rotary is not None for other in coded) else "")


def mean_bits(geometry: ModelGeometry, plan: CompressionPlan) -> float:
    """Return the bits of code per channel and token over all layers that `plan` codes."""
    bits, channels = 0.0, 0
    for index, layer in enumerate(geometry.layers):
        for side in SIDES:
            if (spec := plan.codec(index, side)) is not None:
                count = layer.num_kv_heads * layer.head_dim
                bits, channels = bits + count * spec.layout.bits_per_channel, channels + count
    return bits / channels


def _key_map(layer: LayerGeometry) -> MapKind:
    # Blocks cover all channels in twos; one channel left over outside the rotary pairs leaves only a scale.
    return "scale" if layer.head_dim % 2 else "blocks"
