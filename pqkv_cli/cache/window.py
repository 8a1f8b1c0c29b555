"""Exact tokens: a buffer that grows in small steps, so that a short text costs no more than its tokens; choosing tokens."""

import torch

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
