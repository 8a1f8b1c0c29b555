"""The attention function `pqkv`: attends to codes, sinks and window without rebuilding the cache."""

from typing import Any

import torch

from pqkv_cli.cache.lazy_states import LayerSnapshot, LazyStates
from pqkv_cli.errors import CacheError, UnsupportedModelError
from pqkv_cli.hf.attention import dense_attention, read_arguments, register, sink_share
from pqkv_cli.hf.steps import require
from pqkv_kernels.dispatch import attend_codes, attend_exact

ATTENTION_NAME = "pqkv"


def register_attention() -> None:
    """Make `pqkv` known to transformers; harmless when repeated.

    Layers without codes and steps without coded tokens are left to transformers' own attention.
    """
    register(ATTENTION_NAME, pqkv_attention)


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
        If a handle is stale, or weights are to be dropped at random.
    UnsupportedModelError
        If the model asks for attention of another kind: by a keyword that is not known, or by a mask that is not causal.
    """
    arguments = read_arguments(module, query, scaling, kwargs)
    if not isinstance(key, LazyStates):
        return dense_attention(module, query, key, value, attention_mask, arguments, dropout), None
    snapshot = key.snapshot
    snapshot.check_fresh()
    if not snapshot.num_coded:
        keys, values = snapshot.exact["keys"], snapshot.exact["values"]
        return dense_attention(module, query, keys, values, attention_mask, arguments, dropout), None
    if dropout:
        raise CacheError(
            f"attention weights are to be dropped with probability {dropout:g}; over codes none are: call model.eval() first"
        )
    _check_visible(snapshot, attention_mask, arguments.is_causal, query.shape[2])
    # Every query sees all codes, so a page is decoded once for the whole chunk; what is exact is causal.
    coded = attend_codes(snapshot.backend, query, snapshot.coded_tokens(), arguments.scaling, arguments.softcap)
    output, lse = attend_exact(snapshot.backend, coded, query, snapshot.exact_tokens(), arguments.scaling, arguments.softcap)
    if arguments.sink_logits is not None:
        output = output * sink_share(lse, arguments.sink_logits)[..., None]
    # Some models take views of what attention returns, which only a contiguous tensor has.
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def _check_visible(snapshot: LayerSnapshot, mask: torch.Tensor | None, is_causal: bool, num_queries: int) -> None:
    """Refuse a mask under which queries see other slots than the real ones up to their own, once per step and mask.

    Attention over codes reads no mask: padding is known from the step, and the rest is causal.
    """
    message = (
        "the model's attention mask is not causal: tokens see later ones, or not all earlier ones; expected a causal mask with "
        "padding on the left, as attention over codes assumes: use this model, or this input, without pqkv"
    )
    if mask is None:
        if num_queries > 1 and not is_causal:
            raise UnsupportedModelError(message)
        return
    if snapshot.mask_check.has_passed(mask):
        return
    require(_is_causal(mask, snapshot.row_start, snapshot.num_slots), message, UnsupportedModelError)
    snapshot.mask_check.remember(mask)


def _is_causal(mask: torch.Tensor, starts: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Return where a mask [B or 1, 1 or H, Tq, T] is the causal one of rows that start at `starts` [B]; padding may see all."""
    slots = torch.arange(num_slots, device=mask.device)
    queries = slots[num_slots - mask.shape[2] :]
    first = starts.to(mask.device)[:, None, None, None]
    expected = (slots <= queries[:, None]) & (slots >= first)
    visible = mask[..., :num_slots] if mask.dtype == torch.bool else mask[..., :num_slots] > torch.finfo(mask.dtype).min / 2
    return (visible == expected) | (queries[:, None] < first)
