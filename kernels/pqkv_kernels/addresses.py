"""Where pages of codes lie in memory, as kernels address them. Knows slabs; not what their bytes mean."""

from collections.abc import Sequence

import torch


def whole_slabs(slabs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return `slabs` [B, P, Hkv, page_bytes], copied where the bytes of a page do not lie together.

    Kernels address whole pages; keep what is returned alive until the kernel is done.
    """
    return [slab if slab[:1, :1].is_contiguous() else slab.contiguous() for slab in slabs]


def page_addresses(slabs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the address of every page of every row, [B, P] int64: slabs need not lie together."""
    found = []
    for slab in slabs:
        rows = slab.data_ptr() + torch.arange(slab.shape[0], device=slab.device)[:, None] * slab.stride(0)
        found.append(rows + torch.arange(slab.shape[1], device=slab.device) * slab.stride(1))
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]
