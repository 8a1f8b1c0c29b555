"""The quantized cache as transformers sees it: a `Cache` whose full-attention layers hold codes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pqkv_cli.cache.drift import DriftMeter, DriftVoice, Errors
from pqkv_cli.cache.encoder import EncoderQueue
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.positions import AngleSource, Timeline
from pqkv_cli.cache.simulated import SimulatedLayer
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.cache_layers import CacheLayerMixin, forget, grows, own_layers, tensor_bytes
from pqkv_cli.hf.steps import SteppedCache
from pqkv_cli.quantizers.codec import VectorCodec
from pqkv_cli.specs import CacheSpec, Side
from pqkv_kernels.format.tables import CodecTables


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of the tensors a cache holds; `dense` are layers that are not quantized."""

    codes: int
    exact: int
    dense: int
    positions: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.exact + self.dense + self.positions


class TimedCache(SteppedCache):
    """A cache that is told positions and padding of every step before its layers are updated."""

    def __init__(self, layers: list[CacheLayerMixin], timeline: Timeline) -> None:
        super().__init__(layers=[*layers])
        self.timeline = timeline
        self._owner: weakref.ref[torch.nn.Module] | None = None

    def bind(self, model: torch.nn.Module) -> None:
        """Make this a cache of `model` alone."""
        self._owner = weakref.ref(model)

    def check_owner(self, model: torch.nn.Module) -> None:
        """Refuse another model than the one this cache is bound to, because its codebooks would be wrong.

        Raises
        ------
        CacheError
            If it is bound to another.
        """
        if self._owner is not None and self._owner() is not model:
            raise CacheError(
                "the cache was made for another model, whose codebooks it holds; expected the model that gave it: "
                "make a new one with new_cache() of this model's attach()"
            )

    def begin_step(self, positions: torch.Tensor, row_start: torch.Tensor | None) -> None:
        """Take the facts of the step to come: positions [B, T] of its tokens and first real slots [B] of the rows."""
        self.timeline.begin(self.get_seq_length(), positions, row_start)

    def warn_once(self, key: str, text: str) -> None:
        """Warn with `text` unless something was said under `key` before."""
        self.timeline.notices.once(key, text)

    def reset(self) -> None:
        """Drop all tokens."""
        for layer in self.layers:
            forget(layer)
        super().reset()  # type: ignore[no-untyped-call]
        self.timeline.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        if num_held := self.get_seq_length():
            # Whatever the next step would have read as code stays code: exact tokens before it may be gone.
            self.timeline.settle(num_held)
        super().crop(tokens_to_remove)
        self.timeline.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row `i` by row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_rows(lambda t: t[indices])

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.timeline.map_rows(change)


class QuantizedCache(TimedCache):
    """Sinks, codes and window in every quantized layer; other layers stay as transformers makes them."""

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        """The layers that hold codes."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def num_materialized(self) -> int:
        """How often keys or values were decoded as a whole, because something other than `pqkv` attention read them."""
        return sum(layer.num_materialized for layer in self.quantized_layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots held; by default that of the first quantized layer."""
        if layer_idx == 0 and self.quantized_layers:
            return self.quantized_layers[0].get_seq_length()
        return int(super().get_seq_length(layer_idx))

    def num_bytes(self) -> CacheBytes:
        """Return the bytes of all tensors held between steps."""
        dense = [layer for layer in self.layers if not isinstance(layer, QuantizedLayer)]
        return CacheBytes(
            codes=sum(layer.code_bytes for layer in self.quantized_layers),
            exact=sum(layer.exact_bytes for layer in self.quantized_layers),
            dense=sum(tensor_bytes(layer) for layer in dense),
            positions=self.timeline.num_bytes,
        )


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
