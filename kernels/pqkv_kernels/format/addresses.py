"""Where pages of codes lie in memory, as kernels address them; not what their bytes mean.

A page block is a tensor of pages [B, P, Hkv, page_bytes] that is never moved nor grown.
"""

from collections.abc import Sequence

import torch


class PageBlocks(list[torch.Tensor]):
    """Page blocks in order, which know the addresses of their pages once asked."""

    addresses: torch.Tensor | None = None


def whole_blocks(blocks: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return `blocks` [B, P, Hkv, page_bytes], copied where the bytes of a page do not lie together.

    Kernels address whole pages; keep what is returned alive until the kernel is done.
    """
    if all(map(_is_whole, blocks)):
        return blocks
    return [block if _is_whole(block) else block.contiguous() for block in blocks]


def _is_whole(block: torch.Tensor) -> bool:
    # Asked of strides: a view of one page, which knows, takes ten times as long to make.
    return block.stride()[2:] == (block.shape[3], 1)


def page_addresses(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the address of every page of every row, [B, P] int64: blocks need not lie together."""
    if isinstance(blocks, PageBlocks):
        if blocks.addresses is None:
            blocks.addresses = _page_addresses(blocks)
        return blocks.addresses
    return _page_addresses(blocks)


def _page_addresses(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    addresses = []
    for block in blocks:
        rows = block.data_ptr() + torch.arange(block.shape[0], device=block.device)[:, None] * block.stride(0)
        addresses.append(rows + torch.arange(block.shape[1], device=block.device) * block.stride(1))
    return torch.cat(addresses, dim=1) if len(addresses) > 1 else addresses[0]
