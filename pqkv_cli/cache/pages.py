"""Storage of code pages: slabs that never move. Knows nothing of what the bytes mean."""

from collections.abc import Callable

import torch

SLAB_PAGES = 8


class PageStore:
    """Pages [B, P, Hkv, page_bytes] uint8 of one layer's keys or values.

    A prefill gets one slab of its exact size; later pages come in slabs of `SLAB_PAGES`, so storage never doubles and a
    finished page is never copied.
    """

    def __init__(self) -> None:
        self._slabs: list[torch.Tensor] = []
        self._home: torch.device | None = None  # None: wherever pages are made
        self.num_pages = 0

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """All slabs, [B, P, Hkv, page_bytes] each, unused pages of the last included."""
        return tuple(self._slabs)

    @property
    def home(self) -> torch.device | None:
        """Where `move` has put the pages; None wherever they are made."""
        return self._home

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, unused pages of the last slab included."""
        return sum(slab.numel() for slab in self._slabs)

    def room(self, num_pages: int, page_bytes: int, states: torch.Tensor) -> list[torch.Tensor]:
        """Return where the next `num_pages` pages belong, as parts of slabs in order; `grow` counts them.

        Parameters
        ----------
        states
            What they will stand for, [B, Hkv, T, D]; new slabs lie where it lies unless `move` has chosen another place.
        """
        missing = num_pages - (sum(slab.shape[1] for slab in self._slabs) - self.num_pages)
        if missing > 0:
            size = max(missing, SLAB_PAGES) if self.num_pages else missing
            self._slabs.append(self._new_slab((states.shape[0], size, states.shape[1], page_bytes), states.device))
        return [slab[:, start:stop] for slab, start, stop in self._parts(self.num_pages, self.num_pages + num_pages)]

    def grow(self, num_pages: int) -> None:
        """Count the next `num_pages`, for which there is room."""
        self.num_pages += num_pages

    def views(self, device: torch.device | None = None) -> list[torch.Tensor]:
        """Return the filled parts of the slabs, in order, on `device`; without copying where they lie there."""
        parts = [slab[:, start:stop] for slab, start, stop in self._parts(0, self.num_pages)]
        return parts if device is None else [part.to(device, non_blocking=True) for part in parts]

    def page(self, index: int) -> torch.Tensor:
        """Return one page, [B, 1, Hkv, page_bytes]."""
        slab, start, stop = self._parts(index, index + 1)[0]
        return slab[:, start:stop]

    def truncate(self, num_pages: int) -> None:
        """Keep the first `num_pages` and free slabs that hold none of them."""
        self.num_pages = num_pages
        used = len({id(slab) for slab, _, _ in self._parts(0, num_pages)})
        self._slabs = self._slabs[:used]

    def move(self, home: torch.device) -> None:
        """Keep all pages, those to come too, in the memory of `home`."""
        self._home = home
        self._slabs = [slab.to(home) for slab in self._slabs]

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every slab by `change` of it (rows reordered, moved to a device, ...)."""
        self._slabs = [change(slab) for slab in self._slabs]

    def _new_slab(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        home = self._home or device
        pinned = device.type == "cuda" and home.type == "cpu"  # copies from pinned memory do not wait for each other
        return torch.empty(shape, dtype=torch.uint8, device=home, pin_memory=pinned)

    def _parts(self, start: int, stop: int) -> list[tuple[torch.Tensor, int, int]]:
        parts, first = [], 0
        for slab in self._slabs:
            low, high = max(start - first, 0), min(stop - first, slab.shape[1])
            if low < high:
                parts.append((slab, low, high))
            first += slab.shape[1]
        return parts
