"""What is compressed and how, as frozen data. Knows no torch and no files.

Only independent fields are stored; everything else is derived.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pqkv_kernels.format.layout import CodeLayout, RotaryLayout

KeySpace = Literal["pre_rope", "post_rope"]
# The numbers of a map: none, one per channel, a 2 x 2 matrix per two channels, or a matrix. An artifact says no more of it.
MapKind = Literal["identity", "scale", "blocks", "matrix"]
Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


@dataclass(frozen=True, slots=True)
class CodecMap:
    """A way to make the map of a codec from calibration statistics.

    Attributes
    ----------
    kind
        What numbers it has.
    maker
        ``module:function``, imported where codebooks are fitted: the function takes `quantizers.maps.MapStatistics` and
        returns the map.
    help
        A few words for those who choose.
    is_remade
        Whether a map of kind ``matrix`` is made again once prototypes are fitted, from what they leave over.
    """

    kind: MapKind
    maker: str
    help: str
    is_remade: bool = False


# What a recipe may name. Each kind has a map of its own name, which layers get where the recipe names none.
CODEC_MAPS: dict[str, CodecMap] = {
    "identity": CodecMap("identity", "pqkv_cli.quantizers.maps:identity", "as they are"),
    "scale": CodecMap("scale", "pqkv_cli.quantizers.maps:scale", "each channel by what its errors cost"),
    "blocks": CodecMap("blocks", "pqkv_cli.quantizers.maps:blocks", "the metric of errors within rotary pairs"),
    "matrix": CodecMap("matrix", "pqkv_cli.quantizers.maps:matrix", "the metric of errors over all channels", is_remade=True),
}
# By side; blocks are of rotary pairs, which values do not have.
_SIDE_MAPS: dict[Side, dict[str, CodecMap]] = {
    "keys": CODEC_MAPS,
    "values": {name: row for name, row in CODEC_MAPS.items() if row.kind != "blocks"},
}
# As types, which a recipe checks; type checkers cannot see the names in a table.
if TYPE_CHECKING:
    KeyMap = str
    ValueMap = str
else:
    KeyMap, ValueMap = (Literal[tuple(_SIDE_MAPS[side])] for side in SIDES)


def map_words(side: Side) -> str:
    """Return in one sentence which maps the keys or values of a layer can have."""
    names = ", ".join(f"{name} ({row.help})" for name, row in _SIDE_MAPS[side].items())
    usual = "blocks, or matrix after rotary embedding" if side == "keys" else "matrix"
    return f"Map of {side} before they are coded: {names}; unless given {usual}."


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Hashes that together name a model; a fine-tune shares only the first.

    `former_weights_sha256` is what earlier artifacts carry: of the attention of three layers only.
    """

    config_sha256: str
    weights_sha256: str
    former_weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The attention of one layer. `dense_reason` says why its cache is left as it is; empty means it can be quantized."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryLayout | None
    dense_reason: str = ""

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """What the cache of a model looks like.

    Attributes
    ----------
    model_type, layers, max_positions
        Family, attention of every layer, and how far the model reads (0 where its config names no limit).
    decoded_reason
        Why attention must decode codes instead of reading them; empty where it reads them.
    notes
        One per layer: why its keys are not un-rotated before they are coded; empty where they are. May be left out.
    kv_sources
        One per layer: the layer whose cache it reads. May be left out where each reads its own.
    cached_channels
        One per layer: key and value channels that it keeps of a token, of sliding windows while they fill; 0 where a layer
        keeps a state of constant size or no cache of its own. May be left out.
    """

    model_type: str
    layers: tuple[LayerGeometry, ...]
    max_positions: int
    decoded_reason: str = ""
    notes: tuple[str, ...] = ()
    kv_sources: tuple[int, ...] = ()
    cached_channels: tuple[int, ...] = ()

    def kv_source(self, index: int) -> int:
        """Return the layer whose keys and values layer `index` attends to."""
        return self.kv_sources[index] if self.kv_sources else index

    def cache_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes per token of the uncompressed cache of the layers that can be quantized."""
        return sum(2 * a.num_kv_heads * a.head_dim * element_bytes for a in self.layers if not a.dense_reason)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """One code format.

    Attributes
    ----------
    layout
        How channels are grouped into codes.
    map
        Name of the transform before coding, one of `CODEC_MAPS`.
    key_space
        Where keys are coded; None for values.
    predicted
        Whether only that is coded of values what the decoded keys of the same tokens do not say.
    """

    layout: CodeLayout
    map: str
    key_space: KeySpace | None = None
    predicted: bool = False


def fitting_maps(layer: LayerGeometry, key_space: KeySpace | None) -> tuple[str, ...]:
    """Return the names of the maps that keys of `layer` can have in `key_space`, or its values (None); the usual one first."""
    kinds: tuple[MapKind, ...] = ("scale", "identity")
    if key_space != "pre_rope":
        kinds = ("matrix", *kinds)
    elif layer.head_dim % 2 == 0:  # blocks cover all channels in twos: no channel may be left over outside the rotary pairs
        kinds = ("blocks", *kinds)
    return tuple(name for kind in kinds for name, row in CODEC_MAPS.items() if row.kind == kind)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Names of the codecs of one layer's keys and values, or the reason why the layer stays dense."""

    keys: str = ""
    values: str = ""
    dense_reason: str = ""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What stays exact: the first `num_sinks` real tokens of a row and at least `window_tokens` most recent ones."""

    num_sinks: int = 4
    window_tokens: int = 64


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """Codecs by name and which layer uses which."""

    codecs: Mapping[str, CodecSpec]
    layers: tuple[LayerPlan, ...]
    cache: CacheSpec = field(default_factory=CacheSpec)

    def codec(self, layer: int, side: Side) -> CodecSpec | None:
        """Return the codec of one layer's keys or values, None where the layer stays dense."""
        plan = self.layers[layer]
        return None if plan.dense_reason else self.codecs[getattr(plan, side)]

    def as_stored(self) -> "CompressionPlan":
        """Return the plan as an artifact has it: it holds the numbers of maps and their kinds, not how they were made."""
        kinds = {name: replace(codec, map=CODEC_MAPS[codec.map].kind) for name, codec in self.codecs.items()}
        return replace(self, codecs=kinds)
