"""A step of one token per row over tensors that stay where they are: what a captured step does to a cache.

Between two flushes a cache changes only in its windows. With windows at full capacity, and with their number of tokens in the
memory of the device, a step reads and writes the same addresses every time. Knows buffers; captures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pqkv_cli.cache.lazy_states import LazyStates, StepView
from pqkv_cli.cache.storage import with_room
from pqkv_cli.specs import SIDES, Side

if TYPE_CHECKING:
    from pqkv_cli.cache.cache import QuantizedCache
    from pqkv_cli.cache.layer import QuantizedLayer


class StaticStep:
    """The step of `cache`, for as long as `tensors` are what it holds.

    Parameters
    ----------
    cache
        All its layers are quantized and hold codes, and there `has_room`.

    Attributes
    ----------
    stop
        ``timeline.coded_stop`` of the step, [B] int64.
    newest
        Tokens in the windows before the step, [1] int64: the new one goes behind them.
    tensors
        What a captured step reads and writes, held so that no address is given to anything else.
    """

    def __init__(self, cache: QuantizedCache) -> None:
        self._layers = cache.quantized_layers
        for layer in self._layers:
            layer.encoder.finish()
            for side, window in layer.window.items():
                layer.window[side] = with_room(window, layer.num_window, layer.capacity, layer.capacity)
                layer.window[side][:, :, layer.num_window :] = 0  # no weight makes a number of what is none
        self._timeline, self.stop = cache.timeline, cache.timeline.stops().clone()
        self.newest = torch.tensor([self._layers[0].num_window], device=self._layers[0].device)
        self.tensors, self._num_coded = held_tensors(cache), self._coded()
        self._pages = [store.views() for layer in self._layers for store in layer.pages.values()]  # with their addresses

    def begin(self) -> None:
        """Tell the device where the token of the step to come goes, and what the rows read as codes."""
        self.newest.fill_(self._layers[0].num_window)
        self.stop.copy_(self._timeline.stops())

    def end(self) -> None:
        """Count the token that was put there."""
        for layer in self._layers:
            layer.num_window += 1
            layer.num_updates += 1

    def is_of(self, cache: QuantizedCache) -> bool:
        """Return whether `cache` still holds the same tensors."""
        found = held_tensors(cache)
        same = len(found) == len(self.tensors) and all(a is b for a, b in zip(found, self.tensors, strict=True))
        return same and self._num_coded == self._coded()

    def _coded(self) -> list[int]:
        return [layer.num_coded for layer in self._layers]

    @contextmanager
    def on(self, cache: QuantizedCache) -> Iterator[None]:
        """Let updates of `cache` be this step's, which changes nothing but the windows and may run any number of times."""
        cache.stands = True
        for layer in self._layers:
            layer.static = self
        try:
            yield
        finally:
            cache.stands = False
            for layer in self._layers:
                layer.static = None

    def update(self, layer: QuantizedLayer, states: dict[Side, torch.Tensor]) -> tuple[LazyStates, LazyStates]:
        """Put the new token's keys and values [B, Hkv, 1, D] into the windows and return handles, as `layer.update` does."""
        for side in SIDES:
            layer.window[side].index_copy_(2, self.newest, states[side])
        pages = {side: layer.pages[side].views(layer.device) for side in SIDES}
        held = layer.num_coded, layer.first_exact, pages, dict(layer.sinks), dict(layer.window)
        view = StepView(layer, layer.num_updates, *held, self.stop, self.newest)
        return LazyStates(view, "keys"), LazyStates(view, "values")


def has_room(cache: QuantizedCache) -> bool:
    """Return whether all layers hold codes and can take one more token without a flush."""
    return all(layer.num_coded and layer.fits(1) for layer in cache.quantized_layers)


def held_tensors(cache: QuantizedCache) -> list[torch.Tensor]:
    """Return everything of `cache` that a step over it reads or writes."""
    found = [] if cache.timeline.row_start is None else [cache.timeline.row_start]
    for layer in cache.quantized_layers:
        found += [*layer.sinks.values(), *layer.window.values()]
        found += [slab for store in layer.pages.values() for slab in store.slabs]
    return found
