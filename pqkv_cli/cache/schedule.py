"""When tokens become codes: each row by its own count, so that a padded row is treated as it is alone. Counts; knows no keys.

Alone, a row of `n` tokens has the first ``64 * ((n - W) // 64)`` coded, where `W` is the window. In a batch the pages lie on
one grid of slots, which is a row's own grid only if its padding fills whole pages. So a page is encoded as soon as any row may
count some of its slots as codes, and exact tokens are kept until no row needs them (drawn in `pqkv_cli.cache.layer`).
"""

import torch

from pqkv_kernels.format.layout import PAGE_TOKENS


def num_pages(num_slots: int, window_tokens: int) -> int:
    """Return how many pages are encoded when the cache holds `num_slots`: up to the newest slot that any row counts as code.

    Pages are encoded whole. With windows of fewer than 63 tokens the newest one may lack slots then; it waits for them.
    """
    leaving = num_slots - window_tokens
    return min(-(-leaving // PAGE_TOKENS), num_slots // PAGE_TOKENS) if leaving >= PAGE_TOKENS else 0


def first_exact(num_slots: int, window_tokens: int) -> int:
    """Return the first slot, at the start of a page, that some row may still read exact when the cache holds `num_slots`."""
    return max(num_slots - window_tokens - (PAGE_TOKENS - 1), 0) // PAGE_TOKENS * PAGE_TOKENS


def most_exact(window_tokens: int) -> int:
    """Return how many exact tokens a window holds at most between two steps."""
    return max(window_tokens, PAGE_TOKENS - 1) + 2 * PAGE_TOKENS


def coded_stops(starts: torch.Tensor, num_slots: int, window_tokens: int) -> torch.Tensor:
    """Return the slot behind the last that each row counts as code when the cache holds `num_slots`, [B] int64.

    Parameters
    ----------
    starts
        First real slot of each row, [B] int64.
    """
    own = (num_slots - window_tokens - starts).clamp(min=0) // PAGE_TOKENS * PAGE_TOKENS
    return torch.minimum(starts + own, starts.clamp(min=num_pages(num_slots, window_tokens) * PAGE_TOKENS))
