"""Where a layer keeps its tokens: pages of codes that never move, the window and the sinks. Encodes nothing."""

from collections.abc import Callable
from typing import Any

import torch

from pqkv_kernels.format.addresses import PageBlocks

BLOCK_PAGES = 8


class PageStore:
    """Pages [B, P, Hkv, page_bytes] uint8 of one layer's keys or values, in page blocks: tensors of some pages each.

    A prefill gets one block of its exact size; later pages come in blocks of `BLOCK_PAGES`, so storage never doubles and a
    finished page is never copied.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._home: torch.device | None = None  # None: wherever pages are made
        self.num_pages = 0
        self._views: PageBlocks | None = None  # of all pages, until they change

    @property
    def blocks(self) -> tuple[torch.Tensor, ...]:
        """All blocks, [B, P, Hkv, page_bytes] each, unused pages of the last included."""
        return tuple(self._blocks)

    @property
    def home(self) -> torch.device | None:
        """Where `move` has put the pages; None wherever they are made."""
        return self._home

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, unused pages of the last block and known addresses of pages included."""
        addresses = None if self._views is None else self._views.addresses
        return sum(block.numel() for block in self._blocks) + (0 if addresses is None else addresses.nbytes)

    def room(self, num_pages: int, page_bytes: int, states: torch.Tensor) -> list[torch.Tensor]:
        """Return where the next `num_pages` pages belong, as parts of blocks in order; `grow` counts them.

        Parameters
        ----------
        states
            What they will stand for, [B, Hkv, T, D]; new blocks lie where it lies unless `move` has chosen another device.
        """
        missing = num_pages - (sum(block.shape[1] for block in self._blocks) - self.num_pages)
        if missing > 0:
            size = max(missing, BLOCK_PAGES) if self.num_pages else missing
            self._blocks.append(self._new_block((states.shape[0], size, states.shape[1], page_bytes), states.device))
        return [block[:, start:stop] for block, start, stop in self._parts(self.num_pages, self.num_pages + num_pages)]

    def grow(self, num_pages: int) -> None:
        """Count the next `num_pages`, for which there is room."""
        self.num_pages += num_pages
        self._views = None

    def views(self, device: torch.device | None = None) -> PageBlocks:
        """Return the filled parts of the blocks, in order, on `device`: the same list until pages change, if they lie there."""
        if self._views is None:
            self._views = PageBlocks(block[:, start:stop] for block, start, stop in self._parts(0, self.num_pages))
        if device is None or all(part.device == device for part in self._views):
            return self._views
        return PageBlocks(part.to(device, non_blocking=True) for part in self._views)

    def page(self, index: int) -> torch.Tensor:
        """Return one page, [B, 1, Hkv, page_bytes]."""
        block, start, stop = self._parts(index, index + 1)[0]
        return block[:, start:stop]

    def truncate(self, num_pages: int) -> None:
        """Keep the first `num_pages` and free blocks that hold none of them."""
        self.num_pages, self._views = num_pages, None
        used = len({id(block) for block, _, _ in self._parts(0, num_pages)})
        self._blocks = self._blocks[:used]

    def move(self, home: torch.device) -> None:
        """Keep all pages, those to come too, in the memory of `home`."""
        self._home, self._views = home, None
        self._blocks = [block.to(home) for block in self._blocks]

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every block by `change` of it (rows reordered, moved to a device, ...)."""
        self._blocks, self._views = [change(block) for block in self._blocks], None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": None}  # a copy lies elsewhere

    def _new_block(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        home = self._home or device
        pinned = device.type == "cuda" and home.type == "cpu"  # copies from pinned memory do not wait for each other
        return torch.empty(shape, dtype=torch.uint8, device=home, pin_memory=pinned)

    def _parts(self, start: int, stop: int) -> list[tuple[torch.Tensor, int, int]]:
        parts, first = [], 0
        for block in self._blocks:
            low, high = max(start - first, 0), min(stop - first, block.shape[1])
            if low < high:
                parts.append((block, low, high))
            first += block.shape[1]
        return parts


_STEP_TOKENS = 16


def with_room(buffer: torch.Tensor, num_used: int, num_needed: int, capacity: int) -> torch.Tensor:
    """Return a buffer [B, Hkv, T, D] of at least `num_needed` tokens that starts with the first `num_used` of `buffer`.

    The first tokens get exactly their room, later ones come in steps, and `capacity` is never passed. A buffer with enough
    room is returned as it is; otherwise a new one, because whoever holds a view of the old one must go on seeing it.
    """
    if num_needed <= buffer.shape[2]:
        return buffer
    size = min(num_needed + (_STEP_TOKENS if num_used else 0), max(capacity, num_needed))
    grown = buffer.new_empty(*buffer.shape[:2], size, buffer.shape[3])
    grown[:, :, :num_used] = buffer[:, :, :num_used]
    return grown


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``x[b, :, index[b, t]]`` of `x` [B, Hkv, T, D] and `index` [B, T']."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def coded_then_exact(
    coded: torch.Tensor, first_coded: int, exact: torch.Tensor, first_exact: int, stop: torch.Tensor
) -> torch.Tensor:
    """Return the tokens of two runs of slots, [B, Hkv, T, D]: where both have one, `coded` before a row's `stop`, else `exact`.

    Parameters
    ----------
    coded, exact
        Tokens of the slots from `first_coded` and from `first_exact` on, [B, Hkv, any, D]; no coded slot lies behind the last
        exact one.
    stop
        [B] int64.
    """
    start = max(first_coded, first_exact)
    head = coded[:, :, : start - first_coded] if first_coded < start else exact[:, :, : start - first_exact]
    first, second = coded[:, :, start - first_coded :], exact[:, :, start - first_exact :]
    count = first.shape[2]
    is_coded = torch.arange(start, start + count, device=stop.device) < stop[:, None]
    chosen = torch.where(is_coded[:, None, :, None], first, second[:, :, :count])
    return torch.cat((head, chosen, second[:, :, count:]), dim=2)


def sinks_among(
    states: torch.Tensor, first_slot: int, starts: torch.Tensor, num_sinks: int, known: torch.Tensor
) -> torch.Tensor:
    """Return the rows' sinks [B, Hkv, S, D] where `states` hold them, else as they are `known`; always a new tensor.

    Parameters
    ----------
    states
        Exact tokens of the slots from `first_slot` on, [B, Hkv, T, D].
    starts
        First real slot of each row, [B] int64.
    known
        Sinks so far, [B, Hkv, S or 0, D]; handles of the present step go on seeing them.
    """
    index = starts[:, None] + torch.arange(num_sinks, device=states.device) - first_slot
    inside = (index >= 0) & (index < states.shape[2])
    taken = take_tokens(states, index.clamp(0, states.shape[2] - 1))
    return torch.where(inside[:, None, :, None], taken, known if known.shape[2] else torch.zeros_like(taken))


def with_sinks(decoded: torch.Tensor, first_slot: int, starts: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return `decoded` tokens [B, Hkv, T, D] of the slots from `first_slot` on, with the exact `sinks` in their places."""
    num_sinks = sinks.shape[2]
    if not num_sinks:
        return decoded
    index = torch.arange(first_slot, first_slot + decoded.shape[2], device=decoded.device) - starts[:, None]
    is_sink = (index >= 0) & (index < num_sinks)
    return torch.where(is_sink[:, None, :, None], take_tokens(sinks, index.clamp(0, num_sinks - 1)), decoded)
