"""The quantized cache as transformers sees it: a `Cache` whose full-attention layers hold codes."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pqkv_cli.cache.checks import WarnOnce
from pqkv_cli.cache.drift import DriftAlarm, DriftMeter, Errors
from pqkv_cli.cache.encoder import EncoderQueue
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.positions import SlotPositions
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.cache_layers import CacheLayerMixin, forget, grows, own_layers, tensor_bytes
from pqkv_cli.hf.steps import SteppedCache
from pqkv_cli.models.rotary import AngleSource
from pqkv_cli.specs import CacheSpec, Side
from pqkv_kernels.dispatch import BackendName
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


class PositionedCache(SteppedCache):
    """A cache that gets positions and padding of every step before its layers are updated.

    Parameters
    ----------
    slots
        Shared with the layers.
    warn_once
        Shared with the layers that warn.
    """

    def __init__(self, layers: list[CacheLayerMixin], slots: SlotPositions, warn_once: WarnOnce | None = None) -> None:
        super().__init__(layers=[*layers])
        self.slots = slots
        self._warn_once = WarnOnce() if warn_once is None else warn_once
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
        self.slots.begin(self.get_seq_length(), positions, row_start)

    def warn_once(self, key: str, text: str) -> None:
        """Warn with `text` unless a warning was given under `key` before."""
        self._warn_once(key, text)

    def reset(self) -> None:
        """Drop all tokens."""
        for layer in self.layers:
            forget(layer)
        super().reset()  # type: ignore[no-untyped-call]
        self.slots.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        if num_held := self.get_seq_length():
            # Whatever the next step would have read as code stays code: exact tokens before it may be gone.
            self.slots.settle(num_held)
        super().crop(tokens_to_remove)
        self.slots.crop(self.get_seq_length())

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
        self.slots.map_rows(change)


class QuantizedCache(PositionedCache):
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

    def has_room(self) -> bool:
        """Return whether all quantized layers hold codes and can take one more token without a flush."""
        return all(layer.num_coded and layer.fits(1) for layer in self.quantized_layers)

    @contextmanager
    def in_place(self, newest: torch.Tensor, coded_stop: torch.Tensor) -> Iterator[None]:
        """Let updates of all layers be `QuantizedLayer.in_place`, in a step that `begin_step` has begun already."""
        with ExitStack() as layers:
            for layer in self.quantized_layers:
                layers.enter_context(layer.in_place(newest, coded_stop))
            self.stands = True
            layers.callback(setattr, self, "stands", False)
            yield

    def held_tensors(self) -> list[torch.Tensor]:
        """Return everything that a step over the quantized layers reads or writes."""
        row_start = [] if self.slots.row_start is None else [self.slots.row_start]
        return [*row_start, *(tensor for layer in self.quantized_layers for tensor in layer.held_tensors)]

    def num_bytes(self) -> CacheBytes:
        """Return the bytes of all tensors held between steps."""
        dense = [layer for layer in self.layers if not isinstance(layer, QuantizedLayer)]
        return CacheBytes(
            codes=sum(layer.code_bytes for layer in self.quantized_layers),
            exact=sum(layer.exact_bytes for layer in self.quantized_layers),
            dense=sum(tensor_bytes(layer) for layer in dense),
            positions=self.slots.num_bytes,
        )


AngleSources = Sequence[AngleSource | None]


def quantized_cache(
    config: Any,
    tables: Sequence[Mapping[Side, CodecTables] | None],
    spec: CacheSpec,
    angle_sources: AngleSources,
    errors: Errors | None = None,
    encoder: EncoderQueue | None = None,
    alarm: DriftAlarm | None = None,
    backend: BackendName = "torch",
) -> QuantizedCache:
    """Return an empty cache for a model of `config`; layers whose `tables` are None stay as transformers makes them.

    Given the `errors` of calibration, the cache warns by `alarm` of a text that quantizes far worse. All layers hand what
    leaves their windows to one `encoder`; a new one by default. `backend` encodes and attends to the codes.

    Raises
    ------
    CacheError
        If a layer has tables but is not a growing full-attention layer in transformers.
    """
    slots, warn_once = SlotPositions(spec.window_tokens), WarnOnce()
    encoder = EncoderQueue() if encoder is None else encoder
    meter = None if errors is None else DriftMeter(errors, alarm or DriftAlarm())

    def make(index: int) -> CacheLayerMixin | None:
        layer_tables = tables[index]
        if layer_tables is None:
            return None
        drift = None if meter is None else meter.layer(index)
        source = angle_sources[index]
        return QuantizedLayer(dict(layer_tables), spec, slots, source, backend, drift, encoder, warn_once)

    return QuantizedCache(with_layers(config, len(tables), make), slots, warn_once)


def with_layers(config: Any, num_layers: int, make: Callable[[int], CacheLayerMixin | None]) -> list[CacheLayerMixin]:
    """Return the layers that transformers makes for a model of `config`, those of `make` in place of its own.

    Parameters
    ----------
    num_layers
        Of the artifact.
    make
        Returns the layer of an index, None for one that stays as it is.

    Raises
    ------
    CacheError
        If the model has other layers than the artifact, or one that is to be replaced is not a growing full-attention layer.
    """
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
