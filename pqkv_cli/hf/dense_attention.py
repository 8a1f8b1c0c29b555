"""Attention over plain tensors for layers and steps without codes. Knows masks, soft caps and sinks; no codes.

transformers' sdpa serves the common case; it knows neither soft caps nor attention sinks, which are done here.
"""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pqkv_cli.hf.attention_arguments import AttentionArguments

_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long prompt


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: AttentionArguments,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend with `query` [B, H, Tq, D] to `key` and `value` [B, Hkv, T, D], as sdpa masks them; return [B, Tq, H, D].

    Without a mask the queries are those of the last tokens where attention is causal.
    """
    scale, softcap, sinks = arguments.scaling, arguments.softcap, arguments.sinks
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None and arguments.is_causal and 1 < num_queries < num_keys:  # sdpa would take them for the first
        slots = torch.arange(num_keys, device=query.device)
        attention_mask = (slots <= slots[num_keys - num_queries :, None])[None, None]
    if softcap is None and sinks is None:
        output: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, is_causal=arguments.is_causal
        )[0]
        return output
    if attention_mask is None and not arguments.is_causal:
        attention_mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = _additive(attention_mask, num_queries, num_keys, query.device)
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
