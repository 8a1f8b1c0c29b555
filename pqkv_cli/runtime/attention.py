"""The attention function `pqkv`: attends to codes, sinks and window without rebuilding the cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pqkv_cli.cache.handle import LazyStates, StepView
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.runtime.dense_attention import dense_attention, sink_share
from pqkv_kernels.angles import Angles, PageAngles
from pqkv_kernels.attention import Part
from pqkv_kernels.dispatch import attend_codes, attend_exact
from pqkv_kernels.layout import PAGE_TOKENS

ATTENTION_NAME = "pqkv"


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
    # Every query sees all codes, so a page is decoded once for the whole chunk; what is exact is causal.
    coded = _coded_part(query, view, row_start, scale, softcap)
    output, lse = attend_exact(view.layer.backend, coded, query, view.exact_tokens(row_start), scale, softcap)
    if sinks is not None:
        output = output * sink_share(lse, sinks)[..., None]
    return output.transpose(1, 2).to(query.dtype), None


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
