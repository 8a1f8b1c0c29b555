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
    ModelGeometry,
    Side,
    fitting_maps,
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
    other keys in the metric of their queries; values in the metric of the output projection; or all in the maps that `style`
    names. Codecs are named ``k4`` and
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
        If the rate is unknown or does not fit the head_dim, or the map that `style` names does not fit the side.
    """
    coded_in = _key_space(layer, side, space)
    layout = key_layout if coded_in == "pre_rope" else rate_layout
    predicted = side == "values" and style.predict_values
    return CodecSpec(layout(bits, layer.head_dim, style), _map(layer, side, style, coded_in), coded_in, predicted)


def rated_specs(layer: LayerGeometry, side: Side, style: CodeStyle, space: KeySpace = "pre_rope") -> Mapping[float, CodecSpec]:
    """Return the format of one side of a layer at every rate that fits it, from the lowest.

    Raises
    ------
    UsageError
        If the map that `style` names does not fit the side.
    """
    _map(layer, side, style, _key_space(layer, side, space))
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


def _key_space(layer: LayerGeometry, side: Side, space: KeySpace) -> KeySpace | None:
    """Return where the side is coded if rotary keys are in `space`; None for values."""
    if side == "values":
        return None
    return "post_rope" if layer.rotary is None else space


def _map(layer: LayerGeometry, side: Side, style: CodeStyle, space: KeySpace | None) -> str:
    """Return the map that `style` names, checked to fit, or the usual one."""
    maps, name = fitting_maps(layer, space), style.key_map if side == "keys" else style.value_map
    if name is not None and name not in maps:
        where = {"pre_rope": "keys before rotary embedding", "post_rope": "keys as the cache gets them", None: "values"}[space]
        raise UsageError(
            f"codebooks.{side.removesuffix('s')}_map is {name}; expected one of {', '.join(maps)} for {where} "
            f"of {layer.head_dim} channels; choose one of them, or leave it out"
        )
    return name or maps[0]
