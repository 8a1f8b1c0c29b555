"""One layer of the quantized cache: sinks | codes | window. Computes no attention.

A slot is a column of the cache, padding included. These are the slots of a layer, and how one row of the batch reads them::

    0         row_start                 first_exact    coded_stop    num_coded     num_slots
    | padding | sinks |                 |              |             |                     |
    |================ pages of codes, 64 slots each =================|
              | exact |                 |================= window, exact ==================|
    a row     | exact |------------ codes -------------|-------------- exact --------------|

``row_start`` and ``coded_stop`` are [B], one of each row; the others count for all rows.

row_start
    First real token; its first ``num_sinks`` tokens are the row's sinks, kept exact as well once a page holds them.
first_exact
    First slot of the window, at the start of a page; nobody reads a slot before it exact, but the sinks.
coded_stop
    Slot behind the last that the row reads as code: at least ``first_exact``, at most ``num_coded`` unless the row reads no
    code at all. Then it is ``row_start``. `pqkv_cli.cache.schedule` says when it moves.
num_coded
    Slots that pages hold. From ``first_exact`` to there, two pages at most, slots are held both as code and exact.
num_slots
    Slots held, ``first_exact`` + ``num_window``; what `get_seq_length` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pqkv_cli.cache.checks import DECODED, WarnOnce, check_crop, check_gradients, check_states
from pqkv_cli.cache.drift import LayerDrift
from pqkv_cli.cache.encoder import EncodeJob, EncoderQueue
from pqkv_cli.cache.lazy_states import LayerSnapshot, LazyStates, UpdateCounter
from pqkv_cli.cache.positions import SlotPositions
from pqkv_cli.cache.schedule import first_exact, most_exact, num_pages
from pqkv_cli.cache.storage import PageStore, coded_then_exact, sinks_among, with_room, with_sinks
from pqkv_cli.hf.cache_layers import CacheLayerMixin
from pqkv_cli.models.rotary import AngleSource
from pqkv_cli.specs import SIDES, CacheSpec, Side
from pqkv_kernels.dispatch import BackendName, prepare_tables
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import decode, from_code_space
from pqkv_kernels.reference.prediction import decode_values


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer: pages of codes for old tokens, exact tensors for sinks and for the recent window.

    Padding and sinks are coded too: a uniform layout costs less than it saves. The drawing above names the slots.

    Parameters
    ----------
    tables
        The codecs of ``keys`` and ``values``.
    spec
        How many first and recent tokens stay exact.
    slots
        Positions of the cache's slots, one for all its layers.
    angle_source
        The model's rotary angles, where keys are coded before rotary embedding.
    backend
        What encodes and attends to the codes.
    drift
        Receives samples of what encoding loses.
    encoder
        The queue that all layers of a cache hand their pages to.
    warn_once
        Where the cache's warnings go.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        tables: dict[Side, CodecTables],
        spec: CacheSpec,
        slots: SlotPositions,
        angle_source: AngleSource | None,
        backend: BackendName = "torch",
        drift: LayerDrift | None = None,
        encoder: EncoderQueue | None = None,
        warn_once: WarnOnce | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables, self.spec, self.slots, self.angle_source, self.backend = tables, spec, slots, angle_source, backend
        self._drift, self.capacity = drift, most_exact(spec.window_tokens)  # tokens in the window
        self.encoder = EncoderQueue() if encoder is None else encoder
        self._warn_once = WarnOnce() if warn_once is None else warn_once
        self._updates, self.num_materialized, self._last_job = UpdateCounter(), 0, 0
        self._in_place: tuple[torch.Tensor, torch.Tensor] | None = None  # set inside `in_place`
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
            self.sinks[side] = self.window[side] = states.new_empty(*states.shape[:2], 0, states.shape[3])
        prepare_tables(self.backend, self.tables["keys"], self.tables["values"])
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
        if self._in_place is not None:
            return self._update_in_place(states, *self._in_place)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        check_states(states, self.window, self.get_seq_length(), self.slots.num_slots)
        self.encoder.wait(self._last_job)
        self._updates.count += 1
        fits, num_slots = self.fits(key_states.shape[2]), self.get_seq_length() + key_states.shape[2]
        kept_from = self.first_exact if fits else max(self.first_exact, first_exact(num_slots, self.spec.window_tokens))
        exact = self._joined(states, stays=kept_from == self.first_exact)
        handles = self._handles(exact, self.slots.stops())  # before pages and window change: they see what was there
        if fits:
            self.num_window = num_slots - self.first_exact
        else:
            self._flush(exact, num_slots, kept_from)
        return handles

    def _handles(
        self, exact: dict[Side, torch.Tensor], coded_stop: torch.Tensor, newest: torch.Tensor | None = None
    ) -> tuple[LazyStates, LazyStates]:
        """Return handles on keys and values as the layer holds them now, `exact` in the window."""
        snapshot = LayerSnapshot(
            backend=self.backend,
            tables=self.tables,
            row_start=self.slots.starts(),
            coded_stop=coded_stop,
            num_coded=self.num_coded,
            pages={side: self.pages[side].views(self.device) for side in SIDES},
            angles=self.page_angles(),
            sinks=dict(self.sinks),
            first_exact=self.first_exact,
            exact=dict(exact),
            newest=newest,
            mask_check=self.slots.mask_check,
            decode=self._decode,
            updates=self._updates,
            update=self._updates.count,
        )
        return LazyStates(snapshot, "keys"), LazyStates(snapshot, "values")

    def page_angles(self) -> Angles | PageAngles | None:
        """Return the angles of all pages, where there are any and keys are coded before rotary embedding."""
        if not self.num_coded or self.tables["keys"].rotary is None or self.angle_source is None:
            return None
        return self.slots.page_angles(self.angle_source, self.num_coded // PAGE_TOKENS)

    def pin_window(self) -> None:
        """Give the window all the room it may ever need: until the next flush it is written in place and never moves."""
        self.encoder.finish()
        for side, window in self.window.items():
            self.window[side] = with_room(window, self.num_window, self.capacity, self.capacity)
            self.window[side][:, :, self.num_window :] = 0  # its weight is 0, and 0 * NaN would be NaN

    @contextmanager
    def in_place(self, newest: torch.Tensor, coded_stop: torch.Tensor) -> Iterator[None]:
        """Let updates of one token per row write at ``newest`` of the pinned window, and change nothing else.

        They may run any number of times; `count_token` counts the token.

        Parameters
        ----------
        newest
            Which slot of the window gets the token, [1] int64 in the memory of the device.
        coded_stop
            Where the rows stop to read codes in the step, [B] int64.
        """
        self._in_place = newest, coded_stop
        try:
            yield
        finally:
            self._in_place = None

    def _update_in_place(
        self, states: dict[Side, torch.Tensor], newest: torch.Tensor, coded_stop: torch.Tensor
    ) -> tuple[LazyStates, LazyStates]:
        for side in SIDES:
            self.window[side].index_copy_(2, newest, states[side])
        return self._handles(self.window, coded_stop, newest)

    def count_token(self) -> None:
        """Count a token per row that was written in place."""
        self.num_window += 1
        self._updates.count += 1

    def _decode(self, snapshot: LayerSnapshot, side: Side) -> torch.Tensor:
        """Return all keys or values of `snapshot` decoded, [B, Hkv, T, D] in the cache's dtype."""
        self.num_materialized += 1
        self._warn_once("decoded", DECODED)
        exact = snapshot.exact[side]
        if not snapshot.num_coded:
            return exact
        pages = {each: torch.cat(blocks, dim=1) for each, blocks in snapshot.pages.items()}
        coded = self._decode_pages(side, pages, 0, snapshot.num_coded, snapshot.sinks[side])
        return coded_then_exact(coded, 0, exact, snapshot.first_exact, snapshot.coded_stop)

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
        self._cut_pages(kept)
        self.num_window = kept - self.first_exact

    def _cut_pages(self, kept: int) -> None:
        """Drop the pages that lack slots where `kept` are kept; the window gets what the first of them decodes to.

        Where a row still reads a slot exact, it goes on doing so.
        """
        if kept >= self.num_coded:
            return
        page = kept // PAGE_TOKENS
        start = page * PAGE_TOKENS
        cut: dict[Side, torch.Tensor] = {side: self.pages[side].page(page).to(self.device) for side in SIDES}
        for side in SIDES:
            coded = self._decode_pages(side, cut, start, start + PAGE_TOKENS, self.sinks[side])[:, :, : kept - start]
            if self.first_exact <= start:
                exact = self.window[side][:, :, : kept - self.first_exact]
                coded = coded_then_exact(coded, start, exact, self.first_exact, self.slots.stops())
            self.window[side] = coded
            self.pages[side].truncate(page)
        self.first_exact = min(self.first_exact, start)

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
    def held_tensors(self) -> list[torch.Tensor]:
        """All tensors that a step reads or writes."""
        blocks = [block for store in self.pages.values() for block in store.blocks]
        return [*self.sinks.values(), *self.window.values(), *blocks]

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
        first, starts, before = self.num_coded, self.slots.starts(), self.first_exact
        count = num_pages(num_slots, self.spec.window_tokens) - first // PAGE_TOKENS
        stop = first + count * PAGE_TOKENS
        leaving = {side: exact[side][:, :, first - before : stop - before] for side in SIDES}
        job = EncodeJob(
            backend=self.backend,
            tables=dict(self.tables),
            states=leaving,
            angles={side: self._angles(side, first, stop) for side in SIDES},
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

    def _decode_pages(
        self, side: Side, pages: Mapping[Side, torch.Tensor], start: int, stop: int, sinks: torch.Tensor
    ) -> torch.Tensor:
        """Return what the slots ``start:stop`` of `pages` stand for, [B, Hkv, T, D] in the cache's dtype; `sinks` are exact."""
        keys, values = self.tables["keys"], self.tables["values"]
        if side == "keys":
            decoded = decode(pages["keys"], keys, self._angles(side, start, stop))
        else:
            decoded = from_code_space(decode_values(pages["keys"], pages["values"], keys, values), values)
        return with_sinks(decoded.to(self.dtype), start, self.slots.starts(), sinks)

    def _angles(self, side: Side, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return ``(cos, sin)`` of the slots ``start:stop`` where the codec of `side` works before rotary embedding."""
        return None if self.tables[side].rotary is None else self.slots.angles(self.angle_source, start, stop)

    def __getstate__(self) -> dict[str, Any]:
        self.encoder.finish()  # a copy of what is being written would be neither old nor new
        return self.__dict__

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.encoder.finish()
        self.sinks = {side: change(t) for side, t in self.sinks.items()}
        self.window = {side: change(t) for side, t in self.window.items()}
        for store in self.pages.values():
            store.map_tensors(change)
