"""Attention over plain tensors for layers and steps without codes. Knows masks, soft caps and sinks; no codes.

transformers' sdpa serves the common case; it knows neither soft caps nor attention sinks, which are done here.
"""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long prompt


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend with `query` [B, H, Tq, D] to `key` and `value` [B, Hkv, T, D], as sdpa masks them; return [B, Tq, H, D].

    Without a mask attention is causal, and the queries are those of the last tokens.
    `softcap` (bound of the logits) and `s_aux` (one extra logit per query head [H]) may come in `kwargs`.
    """
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < num_queries < num_keys:  # sdpa would take them for the first
        slots = torch.arange(num_keys, device=query.device)
        attention_mask = (slots <= slots[num_keys - num_queries :, None])[None, None]
    if softcap is None and sinks is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _additive(attention_mask, query.shape[2], key.shape[2], query.device)
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        blocks.append(_attend(query[:, :, rows], key, value, mask[:, :, rows], scale, softcap, sinks))
    return torch.cat(blocks, dim=2).transpose(1, 2).to(query.dtype).contiguous()


def sink_share(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return what is left to the tokens when an extra logit joins their softmax.

    Parameters
    ----------
    lse
        Log-sum-exp of the tokens' logits, [B, H, T] fp32.
    sinks
        Extra logit per query head, [H]; it has no value, so outputs shrink by the returned factor.

    Returns
    -------
    torch.Tensor
        [B, H, T] fp32 in 0..1.
    """
    return torch.sigmoid(lse - sinks.float().view(1, -1, 1))


def _additive(mask: torch.Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return what is added to the logits, [B or 1, 1 or H, Tq, T] fp32.

    Without a mask one query sees all, and as many queries as keys are causal.
    """
    if mask is None:
        last = torch.arange(num_queries, device=device) if num_queries > 1 else torch.tensor([num_keys], device=device)
        mask = (torch.arange(num_keys, device=device) <= last[:, None])[None, None]
    if mask.dtype != torch.bool:
        return mask.float()
    # The smallest number rather than minus infinity: a row that sees nothing gives numbers, which nobody reads.
    return torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    logits = (torch.matmul(grouped, key.float()[:, :, None].mT) * scaling).flatten(1, 2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + mask
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse[..., None]).unflatten(1, (key.shape[1], -1))
    output = torch.matmul(weights, value.float()[:, :, None]).flatten(1, 2)
    return output if sinks is None else output * sink_share(lse, sinks)[..., None]
