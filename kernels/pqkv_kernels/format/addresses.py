"""Where pages of codes lie in memory, as kernels address them. Knows slabs; not what their bytes mean."""

from collections.abc import Sequence

import torch


class Slabs(list[torch.Tensor]):
    """Slabs of pages [B, P, Hkv, page_bytes] that stay where they are, and know the addresses of their pages once asked."""

    addresses: torch.Tensor | None = None


def whole_slabs(slabs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return `slabs` [B, P, Hkv, page_bytes], copied where the bytes of a page do not lie together.

    Kernels address whole pages; keep what is returned alive until the kernel is done.
    """
    if all(map(_is_whole, slabs)):
        return slabs
    return [slab if _is_whole(slab) else slab.contiguous() for slab in slabs]


def _is_whole(slab: torch.Tensor) -> bool:
    # Asked of strides: a view of one page, which knows, takes ten times as long to make.
    return slab.stride()[2:] == (slab.shape[3], 1)


def page_addresses(slabs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the address of every page of every row, [B, P] int64: slabs need not lie together."""
    if isinstance(slabs, Slabs):
        if slabs.addresses is None:
            slabs.addresses = _page_addresses(slabs)
        return slabs.addresses
    return _page_addresses(slabs)


def _page_addresses(slabs: Sequence[torch.Tensor]) -> torch.Tensor:
    found = []
    for slab in slabs:
        rows = slab.data_ptr() + torch.arange(slab.shape[0], device=slab.device)[:, None] * slab.stride(0)
        found.append(rows + torch.arange(slab.shape[1], device=slab.device) * slab.stride(1))
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]
