"""The first real tokens of every row, kept exact beside codes that cover their slots too. Knows slots; encodes nothing."""

import torch

from pqkv_cli.cache.window import take_tokens


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
