"""Where every cached token of a cache stands: row starts and positions, shared by all layers. Knows no keys or values."""

from collections.abc import Callable

import torch

from pqkv_cli.cache.notices import Notices
from pqkv_cli.errors import CacheError
from pqkv_kernels.angles import Angles, PageAngles
from pqkv_kernels.layout import PAGE_TOKENS

AngleSource = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps positions [B, T] int64 to per-pair ``(cos, sin)``, each [B, T, rotary_dim / 2] fp32 of unit modulus."""


class Timeline:
    """Positions of the slots of one cache.

    A slot is a column of the cache: with left padding, slot and position differ. The facts of a step arrive through
    `begin` before any layer is updated, because ``Cache.update`` itself gets neither positions nor padding.

    Attributes
    ----------
    positions
        [B, T] int32, None before the first step.
    row_start
        Slot of the first real token of each row, [B] int64.
    step
        Number of steps begun; a handle of an earlier step is stale.
    notices
        What the cache has warned of.
    """

    def __init__(self) -> None:
        self.step = 0
        self.notices = Notices()
        self.reset()

    def reset(self) -> None:
        """Forget all slots."""
        self.positions: torch.Tensor | None = None
        self.row_start: torch.Tensor | None = None
        self._angles: dict[tuple[int, int, int], Angles] = {}
        self._page_angles: dict[tuple[int, int], Angles | PageAngles] = {}
        self._steps: dict[int, Angles] = {}  # angles inside a page, the same all along

    @property
    def num_slots(self) -> int:
        """Slots known, those of the present step included."""
        return 0 if self.positions is None else self.positions.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors held between steps."""
        held = [t for t in (self.positions, self.row_start) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

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
            If the batch size differs from the cache's, or slots were added without a step.
        """
        if num_past > self.num_slots:
            raise CacheError(
                f"the cache holds {num_past} tokens but knows the positions of {self.num_slots}; "
                "it was filled without `attach`: make a new cache with Attached.new_cache()"
            )
        self.step += 1
        self._forget_angles()
        new = positions.to(torch.int32)
        if self.positions is None or num_past == 0:
            self.positions = new.contiguous()
            self.row_start = torch.zeros(len(new), dtype=torch.int64, device=new.device)
        else:
            if len(new) != len(self.positions):
                raise CacheError(
                    f"a step of {len(new)} rows on a cache of {len(self.positions)} rows; expected the same number: "
                    "use a new cache, or batch_repeat_interleave / batch_select_indices"
                )
            self.positions = torch.cat((self.positions[:, :num_past], new), dim=1)
        if row_start is not None:
            self.row_start = row_start

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
                "`pqkv_cli.runtime.attach` (or `simulate`), which tells them before every step"
            )
        return self.row_start

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
        """Return the angles of the first `num_pages` pages, computed once per step for all layers.

        Where the real tokens of each page stand at consecutive positions that is one angle per page and a constant table;
        else angles per token.

        Raises
        ------
        CacheError
            If positions of these slots are unknown.
        """
        key = (id(source), num_pages)
        if key not in self._page_angles:
            stop = num_pages * PAGE_TOKENS
            base = self._page_bases(stop)
            if base is None:
                per_token = self.angles(source, 0, stop)
                assert per_token is not None  # there is a source
                self._page_angles[key] = per_token
            else:
                if id(source) not in self._steps:
                    cos, sin = source(torch.arange(PAGE_TOKENS, device=base.device)[None])
                    self._steps[id(source)] = cos[0], sin[0]
                self._page_angles[key] = PageAngles(source(base), self._steps[id(source)])
        return self._page_angles[key]

    def _page_bases(self, stop: int) -> torch.Tensor | None:
        """Return the position of the first slot of each page before slot `stop`, [B, P] int64, as its last slot implies.

        None if positions inside a page are not consecutive from the row's first real token on. Slots of padding, whose
        positions mean nothing, may get any angle.
        """
        starts = self.starts()
        assert self.positions is not None  # known together with the row starts
        if stop > self.num_slots:
            raise CacheError(f"positions are known for {self.num_slots} slots; {stop} are needed: attach the model first")
        pages = self.positions[:, :stop].unflatten(1, (-1, PAGE_TOKENS))
        base = pages[..., -1] - (PAGE_TOKENS - 1)
        expected = base[..., None] + torch.arange(PAGE_TOKENS, dtype=torch.int32, device=pages.device)
        padding = torch.arange(stop, device=pages.device).view(-1, PAGE_TOKENS) < starts[:, None, None]
        return base.long() if bool(((pages == expected) | padding).all()) else None

    def _forget_angles(self) -> None:
        self._angles.clear()
        self._page_angles.clear()

    def crop(self, num_slots: int) -> None:
        """Forget the slots from `num_slots` on."""
        self._forget_angles()
        if self.positions is not None:
            self.positions = self.positions[:, :num_slots].contiguous()

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the rows of every tensor by `change` of them (reorder, repeat, select)."""
        self._forget_angles()
        if self.positions is not None and self.row_start is not None:
            self.positions, self.row_start = change(self.positions), change(self.row_start)
