"""Where whole pages of slots begin, and whether positions run on inside them. Looks at every page once; knows no angles."""

import torch

from pqkv_cli.cache.host_copy import HostCopy
from pqkv_kernels.layout import PAGE_TOKENS


class PageBases:
    """The positions of the first slots of whole pages.

    Whether a page can be read with one angle is asked when its last position is known and answered when the page is read,
    which is a step later at least: no step waits for its own answer.
    """

    def __init__(self) -> None:
        self._bases: torch.Tensor | None = None
        self._unread: list[HostCopy] = []
        self._run_on = True

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
        self._unread.append(HostCopy(((pages == expected) | padding).all()))
        self._bases = base if self._bases is None else torch.cat((self._bases, base), dim=1)

    def up_to(self, num_pages: int) -> torch.Tensor | None:
        """Return the position of the first slot of the first `num_pages` pages, [B, P] int64, as their last slots imply.

        None if positions inside a page are not consecutive from the row's first real token on. Slots of padding, whose
        positions mean nothing, may get any angle.
        """
        for answer in self._unread:
            self._run_on = self._run_on and bool(answer.read())
        self._unread.clear()
        if self._bases is None or not self._run_on:
            return None
        return self._bases[:, :num_pages].long()

    def clear(self) -> None:
        """Forget all pages."""
        self._bases, self._run_on = None, True
        self._unread.clear()
