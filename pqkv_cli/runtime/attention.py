"""The attention function `pqkv`: attends to codes, sinks and window without rebuilding the cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pqkv_cli.cache.handle import LazyStates, StepView
from pqkv_cli.runtime.dense_attention import dense_attention, sink_share
from pqkv_kernels.attention import Part, code_attention, code_queries, exact_attention, leave_code_space, merge
from pqkv_kernels.layout import PAGE_TOKENS

ATTENTION_NAME = "pqkv"
_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long chunk


def register_attention() -> None:
    """Make `pqkv` known to transformers; harmless when repeated.

    The mask is that of sdpa: layers without codes and steps without coded tokens are left to transformers' own attention.
    """
    AttentionInterface.register(ATTENTION_NAME, pqkv_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def pqkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with `query` [B, H, Tq, D] to `key` and `value` [B, Hkv, T, D], handles of a quantized layer or tensors.

    Returns
    -------
    tuple
        Output [B, Tq, H, D] and None (weights are never formed).

    Raises
    ------
    CacheError
        If a handle is stale.
    """
    if not isinstance(key, LazyStates):
        return dense_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs), None
    view = key.step_view
    view.check_fresh()
    if not view.num_coded:
        keys, values = view.exact["keys"], view.exact["values"]
        return dense_attention(module, query, keys, values, attention_mask, scaling, dropout, **kwargs), None
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        blocks.append(_attend_block(query, start, min(start + _QUERY_BLOCK, query.shape[2]), view, scale, softcap, sinks))
    return torch.cat(blocks, dim=2).transpose(1, 2).to(query.dtype), None


def _attend_block(
    query: torch.Tensor,
    start: int,
    stop: int,
    view: StepView,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    block = query[:, :, start:stop]
    row_start = view.layer.timeline.starts()
    parts: list[Part] = []
    if view.num_coded:
        parts.append(_coded_part(block, view, row_start, scaling, softcap))
        sink_slots = row_start[:, None] + torch.arange(view.sinks["keys"].shape[2], device=query.device)
        valid = (sink_slots < view.num_coded)[:, None]
        parts.append(exact_attention(block, view.sinks["keys"], view.sinks["values"], valid, scaling, softcap))
    exact_slots = view.num_coded + torch.arange(view.exact["keys"].shape[2], device=query.device)
    query_slots = view.num_slots - query.shape[2] + torch.arange(start, stop, device=query.device)
    causal = exact_slots[None, :] <= query_slots[:, None]
    valid = causal[None] & (exact_slots >= row_start[:, None])[:, None]
    parts.append(exact_attention(block, view.exact["keys"], view.exact["values"], valid, scaling, softcap))
    output, lse = merge(parts)
    return output if sinks is None else output * sink_share(lse, sinks)[..., None]


def _coded_part(query: torch.Tensor, view: StepView, row_start: torch.Tensor, scaling: float, softcap: float | None) -> Part:
    key_tables, value_tables = view.layer.tables["keys"], view.layer.tables["values"]
    angles = view.layer.angles("keys", 0, view.num_coded)
    coded_query = code_queries(query, key_tables)
    first_token = row_start + view.sinks["keys"].shape[2]
    parts, start = [], 0
    for key_pages, value_pages in zip(view.pages["keys"], view.pages["values"], strict=True):
        stop = start + key_pages.shape[1] * PAGE_TOKENS
        slab_angles = None if angles is None else (angles[0][:, start:stop], angles[1][:, start:stop])
        parts.append(
            code_attention(
                coded_query,
                key_pages,
                value_pages,
                key_tables,
                value_tables,
                first_token - start,
                scaling,
                slab_angles,
                softcap,
            )
        )
        start = stop
    output, lse = merge(parts)
    return leave_code_space(output, value_tables), lse.flatten(1, 2)
