"""What of a cache is read exact beside codes: first and recent tokens, each row by its own count. Plain torch; the meaning."""

from dataclasses import dataclass

import torch

from pqkv_kernels.attention import Part, exact_attention, merge

_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long chunk


@dataclass(frozen=True, slots=True, eq=False)
class ExactTokens:
    """Keys and values in model space of the tokens that rows read exact.

    Attributes
    ----------
    sinks
        Keys and values of each row's first real tokens, [B, Hkv, S, D] each; they count where their slot
        is below the row's stop.
    recent
        Keys and values of the slots from `first_slot` on, [B, Hkv, T, D] each; they count from the row's stop on. The last ones
        are the queries' own.
    starts, stops
        First real slot of each row and the slot behind the last that it reads as code, [B] int64.
    newest
        Which of `recent` is the token of the only query, [1] int64, where those behind it are not there yet.
    """

    sinks: tuple[torch.Tensor, torch.Tensor]
    recent: tuple[torch.Tensor, torch.Tensor]
    starts: torch.Tensor
    stops: torch.Tensor
    first_slot: int
    newest: torch.Tensor | None = None

    def query_slots(self, num_queries: int) -> torch.Tensor:
        """Return the slots of the queries, [Tq] int64."""
        if self.newest is not None:
            return self.first_slot + self.newest
        end = self.first_slot + self.recent[0].shape[2]
        return torch.arange(end - num_queries, end, device=self.starts.device)


def add_exact(coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None = None) -> Part:
    """Return attention over coded and exact tokens together.

    Parameters
    ----------
    coded
        What the codes gave: output [B, H, Tq, D] fp32 in model space and log-sum-exp [B, H, Tq] fp32.
    query
        Model-space queries [B, H, Tq, D]; each sees the tokens up to its own.

    Returns
    -------
    tuple
        Output [B, H, Tq, D] fp32 and log-sum-exp [B, H, Tq] fp32.
    """
    parts = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, query.shape[2]))
        part = _exact_part(query, block, exact, scaling, softcap)
        parts.append(merge([part, (coded[0][:, :, block], coded[1][:, :, block])]))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _exact_part(query: torch.Tensor, block: slice, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
    keys, values = exact.recent
    slots = exact.first_slot + torch.arange(keys.shape[2], device=query.device)
    causal = slots[None, :] <= exact.query_slots(query.shape[2])[block, None]
    valid = causal[None] & (slots >= exact.stops[:, None])[:, None]
    if num_sinks := exact.sinks[0].shape[2]:
        sink_slots = exact.starts[:, None] + torch.arange(num_sinks, device=query.device)
        coded = (sink_slots < exact.stops[:, None])[:, None].expand(-1, valid.shape[1], -1)
        keys, values = (torch.cat(both, dim=2) for both in zip(exact.sinks, exact.recent, strict=True))
        valid = torch.cat((coded, valid), dim=-1)
    return exact_attention(query[:, :, block], keys, values, valid, scaling, softcap)
