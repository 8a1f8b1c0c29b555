"""One layer of the quantized cache: sinks | codes | window. Computes no attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pqkv_cli.cache.checks import check_crop, check_gradients, check_states
from pqkv_cli.cache.drift import LayerDrift
from pqkv_cli.cache.encoder import EncoderQueue, PageJob
from pqkv_cli.cache.lazy_states import LazyStates, StepView
from pqkv_cli.cache.positions import DECODED, AngleSource, Timeline
from pqkv_cli.cache.schedule import first_exact, most_exact, num_pages
from pqkv_cli.cache.static_step import StaticStep
from pqkv_cli.cache.storage import PageStore, coded_then_exact, sinks_among, with_room, with_sinks
from pqkv_cli.hf.cache_layers import CacheLayerMixin
from pqkv_cli.specs import SIDES, CacheSpec, Side
from pqkv_kernels.dispatch import Backend, prepare_tables
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import decode


def cut_pages(layer: QuantizedLayer, kept: int) -> None:
    """Drop the pages of `layer` that lack slots where `kept` are kept; the window gets what the first of them decodes to.

    Where a row still reads a slot exact (``timeline.stops()``), it goes on doing so. The caller counts the window's tokens.
    """
    if kept >= layer.num_coded:
        return
    page = kept // PAGE_TOKENS
    start = page * PAGE_TOKENS
    for side in SIDES:
        cut = layer.pages[side].page(page).to(layer.device)
        coded = layer.decoded(side, cut, start, start + PAGE_TOKENS, layer.sinks[side])[:, :, : kept - start]
        if layer.first_exact <= start:
            exact = layer.window[side][:, :, : kept - layer.first_exact]
            coded = coded_then_exact(coded, start, exact, layer.first_exact, layer.timeline.stops())
        layer.window[side] = coded
        layer.pages[side].truncate(page)
    layer.first_exact = min(layer.first_exact, start)


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer: pages of codes for old tokens, exact tensors for sinks and for the recent window.

    Slots ``0 .. 64 * P`` are coded (padding and sinks too: a uniform layout costs less than it saves); the sinks of each
    row are kept exact beside them. The window holds the slots from `first_exact` on, up to two pages of them coded as well:
    which of these a row reads as code, ``timeline.coded_stop`` says (see `pqkv_cli.cache.schedule`).
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    backend: Backend = "torch"  # what attends to the codes; `attach` chooses
    static: StaticStep | None = None  # set while a step is captured

    def __init__(
        self,
        tables: dict[Side, CodecTables],
        spec: CacheSpec,
        timeline: Timeline,
        angle_source: AngleSource | None,
        drift: LayerDrift | None = None,
        encoder: EncoderQueue | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables, self.spec, self.timeline, self.angle_source = tables, spec, timeline, angle_source
        self._drift, self.capacity = drift, most_exact(spec.window_tokens)  # tokens in the window
        self.encoder = EncoderQueue() if encoder is None else encoder
        self.num_updates = self.num_materialized = self._last_job = 0
        self.pages: dict[Side, PageStore] = {side: PageStore() for side in SIDES}
        self._clear()

    def _clear(self) -> None:
        for store in self.pages.values():
            store.truncate(0)
        self.sinks: dict[Side, torch.Tensor] = {}
        self.window: dict[Side, torch.Tensor] = {}
        self.first_exact = self.num_window = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shape, dtype and device of the first states, [B, Hkv, T, D]; sinks and window come when tokens need them."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for side, states in zip(SIDES, (key_states, value_states), strict=True):
            self.tables[side] = self.tables[side].to(states.device)
            prepare_tables(self.backend, self.tables[side])
            self.sinks[side] = self.window[side] = states.new_empty(*states.shape[:2], 0, states.shape[3])
        self.is_initialized = True

    @property
    def num_coded(self) -> int:
        """Slots that pages hold."""
        return self.pages["keys"].num_pages * PAGE_TOKENS

    def fits(self, num_tokens: int) -> bool:
        """Return whether that many more tokens fill no page, so that they change nothing but the window."""
        return num_pages(self.get_seq_length() + num_tokens, self.spec.window_tokens) <= self.pages["keys"].num_pages

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a step's keys and values [B, Hkv, T, D] (keys after rotary embedding) and return handles on all of them.

        What is due as codes goes to the encoder; the handles still see it exact, and see the codes that were there when the
        step began, for which they wait. So results do not depend on when encoding happens.

        Raises
        ------
        CacheError
            If shape, dtype or device differ from the cache's, the step's positions are unknown, or gradients are asked for.
        """
        check_gradients(key_states, value_states)
        states: dict[Side, torch.Tensor] = {"keys": key_states.detach(), "values": value_states.detach()}
        if self.static is not None:
            return self.static.update(self, states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        check_states(states, self.window, self.get_seq_length(), self.timeline.num_slots)
        self.encoder.wait(self._last_job)
        self.num_updates += 1
        fits, num_slots = self.fits(key_states.shape[2]), self.get_seq_length() + key_states.shape[2]
        kept_from = self.first_exact if fits else max(self.first_exact, first_exact(num_slots, self.spec.window_tokens))
        exact = self._joined(states, stays=kept_from == self.first_exact)
        held = self.num_coded, self.first_exact, {s: self.pages[s].views(self.device) for s in SIDES}, dict(self.sinks)
        view = StepView(self, self.num_updates, *held, exact, self.timeline.stops())
        if fits:
            self.num_window = num_slots - self.first_exact
        else:
            self._flush(exact, num_slots, kept_from)
        return LazyStates(view, "keys"), LazyStates(view, "values")

    def materialize(self, view: StepView, side: Side) -> torch.Tensor:
        """Return all keys or values of `view` decoded, [B, Hkv, T, D] in the cache's dtype."""
        self.num_materialized += 1
        self.timeline.notices.once("decoded", DECODED)
        exact = view.exact[side]
        if not view.num_coded:
            return exact
        coded = self.decoded(side, torch.cat(view.pages[side], dim=1), 0, view.num_coded, view.sinks[side])
        return coded_then_exact(coded, 0, exact, view.first_exact, view.stop)

    def get_seq_length(self) -> int:
        """Return the number of slots held."""
        return self.first_exact + self.num_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return key length and offset of the mask of a step of `query_length` tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows without bound."""
        return -1

    def reset(self) -> None:
        """Drop all tokens."""
        self.encoder.finish()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens. Codes stay codes; those of a page that is cut are kept decoded.

        Raises
        ------
        CacheError
            If the number is positive or larger than what is held.
        """
        kept = check_crop(tokens_to_remove, self.get_seq_length())
        self.encoder.finish()
        cut_pages(self, kept)
        self.num_window = kept - self.first_exact

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace row `i` by row ``beam_idx[i]``."""
        self._map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_tensors(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Keep codes in the memory of the CPU from now on; each step copies this layer's codes to the device and drops them."""
        self._move_pages(torch.device("cpu"))

    def prefetch(self) -> None:
        """Keep codes on the layer's device again."""
        self._move_pages(self.device)

    def _move_pages(self, home: torch.device) -> None:
        self.encoder.finish()
        for store in self.pages.values():
            store.move(home)

    @property
    def code_bytes(self) -> int:
        """Bytes of code pages allocated."""
        return sum(store.num_bytes for store in self.pages.values())

    @property
    def exact_bytes(self) -> int:
        """Bytes of sinks and window allocated."""
        return sum(t.nbytes for t in (*self.sinks.values(), *self.window.values()))

    def _joined(self, states: dict[Side, torch.Tensor], stays: bool) -> dict[Side, torch.Tensor]:
        """Return window and new `states` in one, in the window itself where it `stays`."""
        if not stays:
            old = {side: self.window[side][:, :, : self.num_window] for side in SIDES}
            return {s: torch.cat((old[s], states[s]), dim=2) for s in SIDES} if self.num_window else states
        stop = self.num_window + states["keys"].shape[2]
        for side in SIDES:
            self.window[side] = with_room(self.window[side], self.num_window, stop, self.capacity)
            self.window[side][:, :, self.num_window : stop] = states[side]
        return {side: self.window[side][:, :, :stop] for side in SIDES}

    def _flush(self, exact: dict[Side, torch.Tensor], num_slots: int, kept_from: int) -> None:
        """Hand new pages to the encoder; exact tokens before `kept_from` go, in new tensors: the handles keep the old ones."""
        first, starts, before = self.num_coded, self.timeline.starts(), self.first_exact
        count = num_pages(num_slots, self.spec.window_tokens) - first // PAGE_TOKENS
        stop = first + count * PAGE_TOKENS
        leaving = {side: exact[side][:, :, first - before : stop - before] for side in SIDES}
        job = PageJob(
            backend=self.backend,
            tables=dict(self.tables),
            states=leaving,
            angles={side: self.angles(side, first, stop) for side in SIDES},
            room={s: self.pages[s].room(count, self.tables[s].layout.page_bytes, leaving[s]) for s in SIDES},
            drift=self._drift,
            first_slot=first,
            text_start=starts + self.spec.num_sinks,
        )
        sinks = {s: sinks_among(leaving[s], first, starts, self.spec.num_sinks, self.sinks[s]) for s in SIDES}
        num_window, size, window = num_slots - kept_from, self.capacity, self.window
        if kept_from > before:
            window = {s: with_room(x[:, :, kept_from - before :], num_window, size, size) for s, x in exact.items()}
        self._last_job = self.encoder.submit(job, self.device)
        # Only now, when nothing can fail any more: keys and values must not come apart.
        self.sinks, self.window, self.num_window, self.first_exact = sinks, window, num_window, kept_from
        for side in SIDES:
            self.pages[side].grow(count)

    def decoded(self, side: Side, pages: torch.Tensor, start: int, stop: int, sinks: torch.Tensor) -> torch.Tensor:
        """Return what `pages` of the slots ``start:stop`` stand for, [B, Hkv, T, D] in the cache's dtype; `sinks` are exact."""
        decoded = decode(pages, self.tables[side], self.angles(side, start, stop)).to(self.dtype)
        return with_sinks(decoded, start, self.timeline.starts(), sinks)

    def angles(self, side: Side, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return ``(cos, sin)`` of the slots ``start:stop`` where the codec of `side` works before rotary embedding."""
        return None if self.tables[side].rotary is None else self.timeline.angles(self.angle_source, start, stop)

    def __getstate__(self) -> dict[str, Any]:
        self.encoder.finish()  # a copy of what is being written would be neither old nor new
        return self.__dict__

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.encoder.finish()
        self.sinks = {side: change(t) for side, t in self.sinks.items()}
        self.window = {side: change(t) for side, t in self.window.items()}
        for store in self.pages.values():
            store.map_tensors(change)
