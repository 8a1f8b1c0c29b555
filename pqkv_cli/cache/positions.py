"""Positions of a cache's slots, which of them each row reads as codes, and the rotary angles that follow from them."""

from collections.abc import Callable
from weakref import ref

import torch

from pqkv_cli.cache.async_scalar import AsyncScalar
from pqkv_cli.cache.schedule import coded_stops
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.steps import NEXT_TEXT, require
from pqkv_cli.models.rotary import AngleSource
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, PageAngles


class PageBases:
    """The positions of the first slots of whole pages.

    Whether a page can be read with one angle is asked when its last position is known and answered when the page is read,
    which is a step later at least: no step waits for its own answer.
    """

    def __init__(self) -> None:
        self._bases: torch.Tensor | None = None
        self._unread: list[AsyncScalar] = []
        self._are_consecutive = True

    @property
    def num_pages(self) -> int:
        """Pages looked at."""
        return 0 if self._bases is None else self._bases.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._bases is None else self._bases.numel() * self._bases.element_size()

    def extend(self, positions: torch.Tensor, starts: torch.Tensor) -> None:
        """Look at the pages that `positions` [B, T] int32 have completed; `starts` [B] are the rows' first real slots."""
        known = self.num_pages
        pages = positions[:, known * PAGE_TOKENS : positions.shape[1] // PAGE_TOKENS * PAGE_TOKENS].unflatten(
            1, (-1, PAGE_TOKENS)
        )
        if not pages.shape[1]:
            return
        base = pages[..., -1] - (PAGE_TOKENS - 1)
        expected = base[..., None] + torch.arange(PAGE_TOKENS, dtype=torch.int32, device=pages.device)
        slots = torch.arange(known * PAGE_TOKENS, positions.shape[1], device=pages.device)[: pages.shape[1] * PAGE_TOKENS]
        padding = slots.view(-1, PAGE_TOKENS) < starts[:, None, None]
        self._unread.append(AsyncScalar(((pages == expected) | padding).all()))
        self._bases = base if self._bases is None else torch.cat((self._bases, base), dim=1)

    def up_to(self, num_pages: int) -> torch.Tensor | None:
        """Return the position of the first slot of the first `num_pages` pages, [B, P] int64, as their last slots imply.

        None if positions inside a page are not consecutive from the row's first real token on. Slots of padding, whose
        positions mean nothing, may get any angle.
        """
        for answer in self._unread:
            self._are_consecutive = self._are_consecutive and bool(answer.read())
        self._unread.clear()
        if self._bases is None or not self._are_consecutive:
            return None
        return self._bases[:, :num_pages].long()

    def clear(self) -> None:
        """Forget all pages."""
        self._bases, self._are_consecutive = None, True
        self._unread.clear()


class MaskCheck:
    """Which attention mask of one step was found to be causal: all layers get the same one, and one look at it is enough."""

    def __init__(self) -> None:
        self._causal: ref[torch.Tensor] | None = None

    def has_passed(self, mask: torch.Tensor) -> bool:
        """Return whether it was `mask`."""
        return self._causal is not None and self._causal() is mask

    def remember(self, mask: torch.Tensor) -> None:
        """Remember that `mask` is causal."""
        self._causal = ref(mask)


class SlotPositions:
    """Positions of the slots of one cache, and which of them count as codes; the drawing in `pqkv_cli.cache.layer` shows them.

    A slot is a column of the cache: with left padding, slot and position differ. The facts of a step arrive through
    `begin` before any layer is updated, because ``Cache.update`` itself gets neither positions nor padding.

    Attributes
    ----------
    positions
        [B, T] int32, None before the first step.
    row_start
        Slot of the first real token of each row, [B] int64.
    coded_stop
        Slot behind the last that each row reads as code in the present step, [B] int64: never less than before, unless the
        cache was cropped.
    mask_check
        Which attention mask of the present step was found to be causal; every step has a new one.
    """

    def __init__(self, window_tokens: int = 0) -> None:
        self._window_tokens = window_tokens
        self.mask_check = MaskCheck()
        self.reset()

    def reset(self) -> None:
        """Forget all slots."""
        self.positions: torch.Tensor | None = None
        self.row_start: torch.Tensor | None = None
        self.coded_stop: torch.Tensor | None = None
        self._angles: dict[tuple[int, int, int], Angles] = {}
        self._bases = PageBases()
        self._page_angles: dict[int, tuple[int, Angles | PageAngles]] = {}  # of the newest number of pages
        self._steps: dict[int, Angles] = {}  # angles inside a page, the same all along

    @property
    def num_slots(self) -> int:
        """Slots known, those of the present step included."""
        return 0 if self.positions is None else self.positions.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors held between steps."""
        held = [t for t in (self.positions, self.row_start, self.coded_stop) if t is not None]
        held += [t for _, angles in self._page_angles.values() if isinstance(angles, PageAngles) for t in angles.base]
        return sum(t.numel() * t.element_size() for t in held) + self._bases.num_bytes

    def begin(self, num_past: int, positions: torch.Tensor, row_start: torch.Tensor | None) -> None:
        """Start a step that adds ``positions.shape[1]`` slots after the first `num_past`.

        Parameters
        ----------
        num_past
            Slots that the layers hold; anything known beyond them came from a step that failed.
        positions
            Positions of the new tokens, [B, Tnew] integers.
        row_start
            [B] int64, or None to keep what is known (zero at first).

        Raises
        ------
        CacheError
            If the batch size differs from the cache's, slots were added without a step, or the tokens stand where the cache
            has some already.
        """
        if num_past > self.num_slots:
            raise CacheError(
                f"the cache holds {num_past} tokens but knows the positions of {self.num_slots}; "
                "it was filled without `attach`: make a new cache with Attached.new_cache()"
            )
        self.mask_check = MaskCheck()
        self._angles.clear()
        if num_past < self.num_slots:
            self._forget_angles()
        new = positions.to(torch.int32)
        if self.positions is None or num_past == 0:
            self.positions = new.contiguous()
            self.row_start = torch.zeros(len(new), dtype=torch.int64, device=new.device)
            self.coded_stop = None
        else:
            if len(new) != len(self.positions):
                raise CacheError(
                    f"a step of {len(new)} rows on a cache of {len(self.positions)} rows; expected the same number: "
                    "use a new cache, or batch_repeat_interleave / batch_select_indices"
                )
            self.positions = torch.cat((self.positions[:, :num_past], new), dim=1)
        if row_start is not None:
            self.row_start = row_start
        self._check_order(num_past)
        self.settle(num_past)
        self._bases.extend(self.positions, self.starts())

    def _check_order(self, num_past: int) -> None:
        """Refuse a step that begins at a position which the cache holds: its text would stand there twice."""
        if num_past and self.positions is not None:
            starts, new = self.starts(), self.positions[:, num_past]
            first = self.positions.gather(1, starts.clamp(max=num_past - 1)[:, None])[:, 0]
            is_held = (starts < num_past) & (first <= new) & (new <= self.positions[:, num_past - 1])
            require(
                (new >= num_past - starts) & ~is_held,
                f"the step begins at a position that the cache of {num_past} tokens holds already; expected the tokens behind "
                f"them: {NEXT_TEXT}",
            )

    def settle(self, num_slots: int) -> None:
        """Count as codes what the rows do not read exact with `num_slots` in the cache."""
        stops = coded_stops(self.starts(), num_slots, self._window_tokens)
        self.coded_stop = stops if self.coded_stop is None else torch.maximum(self.coded_stop, stops)

    def starts(self) -> torch.Tensor:
        """Return `row_start`, [B] int64.

        Raises
        ------
        CacheError
            If no step has begun.
        """
        if self.row_start is None:
            raise CacheError(
                "the cache was updated without knowing the step's positions; expected a model prepared by "
                "`pqkv_cli.runtime.attach` (or `simulate`), which gives the cache the positions of every step"
            )
        return self.row_start

    def stops(self) -> torch.Tensor:
        """Return `coded_stop`, [B] int64; as `starts`."""
        self.starts()
        assert self.coded_stop is not None  # known together with the row starts
        return self.coded_stop

    def angles(self, source: AngleSource | None, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return ``(cos, sin)`` of the slots ``start:stop``, computed once per step for all layers; None without `source`.

        Raises
        ------
        CacheError
            If positions of these slots are unknown.
        """
        if source is None:
            return None
        self.starts()
        assert self.positions is not None  # known together with the row starts
        if stop > self.num_slots:
            raise CacheError(f"positions are known for {self.num_slots} slots; {stop} are needed: attach the model first")
        key = (id(source), start, stop)
        if key not in self._angles:
            self._angles[key] = source(self.positions[:, start:stop].long())
        return self._angles[key]

    def page_angles(self, source: AngleSource, num_pages: int) -> Angles | PageAngles:
        """Return the angles of the first `num_pages` pages, computed for all layers when pages are added.

        Where the real tokens of each page stand at consecutive positions that is one angle per page and a constant table;
        else angles per token.

        Raises
        ------
        CacheError
            If positions of these slots are unknown.
        """
        known, angles = self._page_angles.get(id(source), (0, None))
        if angles is None or known != num_pages or not isinstance(angles, PageAngles):
            angles = self._angles_of_pages(source, num_pages)
            self._page_angles[id(source)] = num_pages, angles
        return angles

    def _angles_of_pages(self, source: AngleSource, num_pages: int) -> Angles | PageAngles:
        stop = num_pages * PAGE_TOKENS
        if stop > self.num_slots:
            raise CacheError(f"positions are known for {self.num_slots} slots; {stop} are needed: attach the model first")
        assert self.positions is not None  # there are slots, or nothing to ask for
        self._bases.extend(self.positions, self.starts())
        base = self._bases.up_to(num_pages)
        if base is None:
            per_token = self.angles(source, 0, stop)
            assert per_token is not None  # there is a source
            return per_token
        if id(source) not in self._steps:
            cos, sin = source(torch.arange(PAGE_TOKENS, device=base.device)[None])
            self._steps[id(source)] = cos[0], sin[0]
        cos, sin = (t.contiguous() for t in source(base))  # a view would keep all that it is cut from
        return PageAngles((cos, sin), self._steps[id(source)])

    def _forget_angles(self) -> None:
        self._angles.clear()
        self._page_angles.clear()
        self._bases.clear()

    def crop(self, num_slots: int) -> None:
        """Forget the slots from `num_slots` on."""
        self._forget_angles()
        if self.positions is not None:
            self.positions = self.positions[:, :num_slots].contiguous()
        if self.coded_stop is not None:  # of a page that is cut, what was code is exact from now on: its decoded values
            self.coded_stop = self.coded_stop.clamp(max=num_slots // PAGE_TOKENS * PAGE_TOKENS)

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the rows of every tensor by `change` of them (reorder, repeat, select)."""
        self._forget_angles()
        if self.positions is not None and self.row_start is not None and self.coded_stop is not None:
            self.positions, self.row_start = change(self.positions), change(self.row_start)
            self.coded_stop = change(self.coded_stop)
