"""One row of a quantized cache, taken out of it and put into a new one: codes, sinks, window, states. Knows no files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.schedule import coded_stops, first_exact, num_pages
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.layer_state import Facts, can_crop, one_row, put_together, taken_apart
from pqkv_cli.specs import SIDES, Side

PageParts = tuple[torch.Tensor, ...]
"""Pages of one side of one layer in order, as parts [P, Hkv, page_bytes] uint8."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """How many tokens of a row without padding lie where; the words are those of `pqkv_cli.cache.layer`.

    Attributes
    ----------
    num_slots, num_pages, first_exact, coded_stop
        Tokens held; pages that hold codes; where the window begins; where the row stopped to read codes in its last step.
    block_pages
        Pages that each page block has room for: what is added up block by block is then added in the same order again.
    first_position
        Position of the first token; the others follow it one by one.
    shortest
        Least number of tokens to which the row can be cut (`cut`).
    """

    num_slots: int
    num_pages: int
    first_exact: int
    coded_stop: int
    block_pages: tuple[int, ...]
    first_position: int
    shortest: int

    def cut(self, num_tokens: int, window_tokens: int) -> "RowShape":
        """Return what a row of the first `num_tokens` holds: what it reads exact must be held exact (`shortest`)."""
        if num_tokens == self.num_slots:
            return self
        pages = min(self.num_pages, num_pages(num_tokens, window_tokens))
        blocks, room = 0, 0
        while room < pages:
            room += self.block_pages[blocks]
            blocks += 1
        return replace(
            self,
            num_slots=num_tokens,
            num_pages=pages,
            first_exact=max(self.first_exact, first_exact(num_tokens, window_tokens)),
            coded_stop=min(self.coded_stop, int(coded_stops(torch.zeros(1, dtype=torch.int64), num_tokens, window_tokens))),
            block_pages=self.block_pages[:blocks],
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldRow:
    """What one row of a cache holds.

    Attributes
    ----------
    exact
        By name: ``layers.I.SIDE.sinks`` and ``layers.I.SIDE.window`` [Hkv, T, D] of layers with codes, and the tensors of the
        other layers, one row each.
    others
        Of each layer without codes its class and its plain facts; None where there are codes.
    pages
        Of every layer with codes its keys, then its values.
    """

    shape: RowShape
    exact: Mapping[str, torch.Tensor]
    others: tuple[tuple[str, Facts] | None, ...]
    pages: tuple[PageParts, ...]


def take_row(cache: QuantizedCache, row: int = 0) -> HeldRow:
    """Return what row `row` of `cache` holds, as views where that is possible.

    Raises
    ------
    CacheError
        If there is no such row, it holds nothing, has padding or positions with gaps, or a step has failed half-way.
    """
    coded = cache.quantized_layers
    _check_row(cache, row)
    exact: dict[str, torch.Tensor] = {}
    others: list[tuple[str, Facts] | None] = []
    num_rows, croppable = len(cache.slots.starts()), True
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, QuantizedLayer):
            layer.encoder.finish()
            for side in SIDES:
                exact[f"layers.{index}.{side}.sinks"] = layer.sinks[side][row]
                exact[f"layers.{index}.{side}.window"] = layer.window[side][row, :, : layer.num_window]
            others.append(None)
            continue
        croppable = croppable and can_crop(layer)
        tensors, facts = taken_apart(one_row(layer, row, num_rows))
        exact |= {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}
        others.append((type(layer).__name__, facts))
    pages = tuple(tuple(part[row] for part in layer.pages[side].views()) for layer in coded for side in SIDES)
    return HeldRow(_shape(cache, row, croppable), exact, tuple(others), pages)


def put_row(cache: QuantizedCache, held: HeldRow, num_tokens: int, device_of: Callable[[int], torch.device]) -> list[PageParts]:
    """Let `cache`, a new one, hold the first `num_tokens` of `held`, all but its pages; return where these belong.

    Parameters
    ----------
    held
        Its `pages` are not read.
    num_tokens
        From ``held.shape.shortest`` on.
    device_of
        The device of a layer.

    Returns
    -------
    list
        Of every layer with codes the room for the pages of its keys, then of its values.

    Raises
    ------
    CacheError
        If a layer is of another class than the one that was taken apart.
    """
    shape = held.shape.cut(num_tokens, cache.quantized_layers[0].spec.window_tokens)
    room: list[PageParts] = []
    for index, layer in enumerate(cache.layers):
        other, device = held.others[index], device_of(index)
        if isinstance(layer, QuantizedLayer):
            room += _fill_coded(layer, index, held, shape, device)
            continue
        if other is None or other[0] != type(layer).__name__:
            raise CacheError(
                f"layer {index} of the stored prefix is a {'layer of codes' if other is None else other[0]}, this model's is a "
                f"{type(layer).__name__}; expected the same: use the version of transformers that stored it, or store it again"
            )
        own = f"layers.{index}."
        tensors = {name.removeprefix(own): tensor for name, tensor in held.exact.items() if name.startswith(own)}
        put_together(layer, tensors, other[1], device)
        if num_tokens < held.shape.num_slots:
            other_layer: Any = layer
            other_layer.crop(num_tokens - held.shape.num_slots)
    _fill_positions(cache, shape, device_of(0))
    return room


def _fill_coded(layer: QuantizedLayer, index: int, held: HeldRow, shape: RowShape, device: torch.device) -> list[PageParts]:
    sinks, window = (
        {side: held.exact[f"layers.{index}.{side}.{part}"][None].to(device) for side in SIDES} for part in ("sinks", "window")
    )
    kept = slice(shape.first_exact - held.shape.first_exact, shape.num_slots - held.shape.first_exact)
    window = {side: tensor[:, :, kept] for side, tensor in window.items()}
    layer.lazy_initialization(window["keys"], window["values"])
    room = [_room(layer, side, shape, window[side]) for side in SIDES]
    layer.window, layer.first_exact, layer.num_window = window, shape.first_exact, shape.num_slots - shape.first_exact
    if shape.num_pages:
        layer.sinks = sinks
    return room


def _room(layer: QuantizedLayer, side: Side, shape: RowShape, states: torch.Tensor) -> PageParts:
    """Make the page blocks of one side as they were; the last may have room left."""
    store, page_bytes = layer.pages[side], layer.tables[side].layout.page_bytes
    parts: list[torch.Tensor] = []
    for size in shape.block_pages:
        used = min(size, shape.num_pages - store.num_pages)
        parts += [part[0, :used] for part in store.room(size, page_bytes, states)]
        store.grow(used)
    return tuple(parts)


def _fill_positions(cache: QuantizedCache, shape: RowShape, device: torch.device) -> None:
    slots, first = cache.slots, shape.first_position
    slots.positions = torch.arange(first, first + shape.num_slots, dtype=torch.int32, device=device)[None]
    slots.row_start = torch.zeros(1, dtype=torch.int64, device=device)
    slots.coded_stop = torch.full((1,), shape.coded_stop, dtype=torch.int64, device=device)


def _check_row(cache: QuantizedCache, row: int) -> None:
    lengths = {layer.get_seq_length() for layer in cache.quantized_layers}
    if lengths == {0}:
        raise CacheError("the cache holds no tokens; expected a text that the model has read: run it first")
    if len(lengths) != 1 or cache.slots.num_slots not in lengths:
        raise CacheError(
            f"the layers of the cache hold {sorted(lengths)} tokens, {cache.slots.num_slots} are known; expected the same "
            "number: a step failed half-way, so make a new cache"
        )
    starts = cache.slots.starts().tolist()
    if not 0 <= row < len(starts):
        raise CacheError(f"row {row} is asked for and the cache has {len(starts)}; expected one of 0 to {len(starts) - 1}")
    if starts[row]:
        raise CacheError(
            f"row {row} begins with {starts[row]} tokens of padding, and its codes lie on the pages of the whole batch; "
            "expected a row without padding: run this text alone, or save the longest row"
        )


def _shape(cache: QuantizedCache, row: int, croppable: bool) -> RowShape:
    slots, first = cache.slots, cache.quantized_layers[0]
    assert slots.positions is not None  # there are tokens
    positions, num_slots = slots.positions[row], slots.num_slots
    if bool((positions.diff() != 1).any()):
        raise CacheError(
            f"the tokens of row {row} stand at positions with gaps; expected positions that follow one by one: "
            "run the text without position_ids of its own"
        )
    found = {_layout(layer, side) for layer in cache.quantized_layers for side in SIDES}
    if len(found) != 1:
        raise CacheError("the layers of the cache hold different pages; expected the same: make a new cache")
    ((pages, blocks, begin),) = found
    shortest = 1 if begin == 0 else begin + first.spec.window_tokens
    return RowShape(
        num_slots=num_slots,
        num_pages=pages,
        first_exact=begin,
        coded_stop=int(slots.stops()[row]),
        block_pages=blocks,
        first_position=int(positions[0]),
        shortest=min(shortest, num_slots) if croppable else num_slots,
    )


def _layout(layer: QuantizedLayer, side: Side) -> tuple[int, tuple[int, ...], int]:
    store = layer.pages[side]
    return store.num_pages, tuple(block.shape[1] for block in store.blocks), layer.first_exact
