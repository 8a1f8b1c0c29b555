"""Puts caches together from a model config, layer by layer. Knows no model weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pqkv_cli.cache.cache import QuantizedCache, TimedCache
from pqkv_cli.cache.drift import DriftMeter, DriftVoice, Errors
from pqkv_cli.cache.encoder import EncoderQueue
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.simulated import SimulatedLayer
from pqkv_cli.cache.timeline import AngleSource, Timeline
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.cache_layers import CacheLayerMixin, grows, own_layers
from pqkv_cli.quantizers.codec import VectorCodec
from pqkv_cli.specs import CacheSpec, Side
from pqkv_kernels.tables import CodecTables

AngleSources = Sequence[AngleSource | None]


def quantized_cache(
    config: Any,
    tables: Sequence[Mapping[Side, CodecTables] | None],
    spec: CacheSpec,
    angle_sources: AngleSources,
    errors: Errors | None = None,
    encoder: EncoderQueue | None = None,
    voice: DriftVoice | None = None,
) -> QuantizedCache:
    """Return an empty cache for a model of `config`; layers whose `tables` are None stay as transformers makes them.

    Given the `errors` of calibration, the cache warns with `voice` of a text that quantizes far worse. All layers hand what
    leaves their windows to one `encoder`; a new one by default.

    Raises
    ------
    CacheError
        If a layer has tables but is not a growing full-attention layer in transformers.
    """
    timeline, encoder = Timeline(spec.window_tokens), EncoderQueue() if encoder is None else encoder
    meter = None if errors is None else DriftMeter(errors, voice or DriftVoice())

    def make(index: int) -> CacheLayerMixin | None:
        layer_tables = tables[index]
        if layer_tables is None:
            return None
        drift = None if meter is None else meter.layer(index)
        return QuantizedLayer(dict(layer_tables), spec, timeline, angle_sources[index], drift, encoder)

    return QuantizedCache(_layers(config, len(tables), make), timeline)


def simulated_cache(config: Any, codecs: Sequence[dict[Side, VectorCodec] | None], angle_sources: AngleSources) -> TimedCache:
    """Return an empty cache of mode `all`.

    Raises
    ------
    CacheError
        As `quantized_cache`.
    """
    timeline = Timeline()

    def make(index: int) -> CacheLayerMixin | None:
        layer_codecs = codecs[index]
        return None if layer_codecs is None else SimulatedLayer(layer_codecs, timeline, angle_sources[index])

    return TimedCache(_layers(config, len(codecs), make), timeline)


def _layers(config: Any, num_layers: int, make: Callable[[int], CacheLayerMixin | None]) -> list[CacheLayerMixin]:
    layers = own_layers(config)
    if len(layers) > num_layers:
        raise CacheError(f"transformers makes {len(layers)} cache layers for this model; the artifact describes {num_layers}")
    for index in range(num_layers):
        layer = make(index)
        if layer is None:
            continue
        if index >= len(layers):
            raise CacheError(f"transformers makes {len(layers)} cache layers for this model; layer {index} is quantized")
        if not grows(layers[index]):
            raise CacheError(
                f"layer {index} is quantized in the artifact but is a {type(layers[index]).__name__} in this model; "
                "expected a full-attention layer: fit and export again for this model"
            )
        layers[index] = layer
    return layers
