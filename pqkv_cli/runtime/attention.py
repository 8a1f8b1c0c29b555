"""The attention function `pqkv`: attends to codes, sinks and window without rebuilding the cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pqkv_cli.cache.handle import LazyStates, StepView
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.runtime.dense_attention import dense_attention, sink_share
from pqkv_kernels.angles import Angles, PageAngles
from pqkv_kernels.attention import Part, exact_attention, merge
from pqkv_kernels.dispatch import attend_codes
from pqkv_kernels.layout import PAGE_TOKENS

ATTENTION_NAME = "pqkv"
_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long chunk


def register_attention() -> None:
    """Make `pqkv` known to transformers; harmless when repeated.

    Layers without codes and steps without coded tokens are left to transformers' own attention.
    """
    AttentionInterface.register(ATTENTION_NAME, pqkv_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, pqkv_mask)


def pqkv_mask(*, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of sdpa; None only where one query sees all keys, or as many queries as keys are causal.

    sdpa also leaves it out for the first tokens of a longer, static cache. But Gemma 4 drops queries after its mask is made, so
    that fewer queries than keys without a mask must mean the last ones.
    """
    skip = kwargs.pop("allow_is_causal_skip", True) and q_length in (1, kv_length)
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)
    return mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    row_start = view.layer.timeline.starts()
    # Every query sees all codes, so a page is decoded once for the whole chunk; the exact part is causal, block by block.
    coded_output, coded_lse = _coded_part(query, view, row_start, scale, softcap)
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, query.shape[2]))
        parts = _exact_parts(query, block, view, row_start, scale, softcap)
        output, lse = merge([*parts, (coded_output[:, :, block], coded_lse[:, :, block])])
        blocks.append(output if sinks is None else output * sink_share(lse, sinks)[..., None])
    return torch.cat(blocks, dim=2).transpose(1, 2).to(query.dtype), None


def _exact_parts(
    query: torch.Tensor, block: slice, view: StepView, row_start: torch.Tensor, scaling: float, softcap: float | None
) -> list[Part]:
    """Attend with the queries of `block` to the exact sinks and to the tokens after the codes."""
    queries = query[:, :, block]
    keys, values = view.exact["keys"], view.exact["values"]
    exact_slots = view.first_exact + torch.arange(keys.shape[2], device=query.device)
    query_slots = view.query_slots(query.shape[2])[block]
    causal = exact_slots[None, :] <= query_slots[:, None]
    valid = causal[None] & (exact_slots >= view.stop[:, None])[:, None]
    if num_sinks := view.sinks["keys"].shape[2]:
        sink_slots = row_start[:, None] + torch.arange(num_sinks, device=query.device)
        coded = (sink_slots < view.stop[:, None])[:, None].expand(-1, valid.shape[1], -1)
        keys, values = torch.cat((view.sinks["keys"], keys), dim=2), torch.cat((view.sinks["values"], values), dim=2)
        valid = torch.cat((coded, valid), dim=-1)
    return [exact_attention(queries, keys, values, valid, scaling, softcap)]


def _coded_part(query: torch.Tensor, view: StepView, row_start: torch.Tensor, scaling: float, softcap: float | None) -> Part:
    layer = view.layer
    tables, angles = layer.tables, angles_of_pages(layer, view.num_coded)
    spans = torch.stack((row_start + view.sinks["keys"].shape[2], view.stop), dim=1)
    pages = view.pages
    return attend_codes(
        layer.backend,
        query,
        pages["keys"],
        pages["values"],
        tables["keys"],
        tables["values"],
        spans,
        scaling,
        angles,
        softcap,
    )


def angles_of_pages(layer: QuantizedLayer, num_coded: int) -> Angles | PageAngles | None:
    """Return the angles of the first `num_coded` slots, whole pages, where keys are coded before rotary embedding."""
    if layer.tables["keys"].rotary is None or layer.angle_source is None:
        return None
    return layer.timeline.page_angles(layer.angle_source, num_coded // PAGE_TOKENS)
