"""The attention function `pqkv`: attends to codes, sinks and window without rebuilding the cache."""

from typing import Any
from weakref import ref

import torch

from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.lazy_states import LazyStates, StepView
from pqkv_cli.errors import CacheError, UnsupportedModelError
from pqkv_cli.hf.attention import dense_attention, read_arguments, register, sink_share
from pqkv_cli.hf.steps import require
from pqkv_kernels.dispatch import attend_codes, attend_exact
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.reference.attention import Part

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
    view = key.step_view
    view.check_fresh()
    if not view.num_coded:
        keys, values = view.exact["keys"], view.exact["values"]
        return dense_attention(module, query, keys, values, attention_mask, arguments, dropout), None
    if dropout:
        raise CacheError(
            f"attention weights are to be dropped with probability {dropout:g}; over codes none are: call model.eval() first"
        )
    row_start = view.layer.timeline.starts()
    _check_visible(view, attention_mask, arguments.is_causal, query.shape[2])
    # Every query sees all codes, so a page is decoded once for the whole chunk; what is exact is causal.
    coded = _coded_part(query, view, row_start, arguments.scaling, arguments.softcap)
    output, lse = attend_exact(
        view.layer.backend, coded, query, view.exact_tokens(row_start), arguments.scaling, arguments.softcap
    )
    if arguments.sinks is not None:
        output = output * sink_share(lse, arguments.sinks)[..., None]
    # Some models take views of what attention returns, which only a contiguous tensor has.
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def _check_visible(view: StepView, mask: torch.Tensor | None, is_causal: bool, num_queries: int) -> None:
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
    timeline = view.layer.timeline
    if timeline.checked_mask is not None and timeline.checked_mask() is mask:
        return
    require(_is_causal(mask, timeline.starts(), view.num_slots), message, UnsupportedModelError)
    timeline.checked_mask = ref(mask)


def _is_causal(mask: torch.Tensor, starts: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Return where a mask [B or 1, 1 or H, Tq, T] is the causal one of rows that start at `starts` [B]; padding may see all."""
    slots = torch.arange(num_slots, device=mask.device)
    queries = slots[num_slots - mask.shape[2] :]
    first = starts.to(mask.device)[:, None, None, None]
    expected = (slots <= queries[:, None]) & (slots >= first)
    visible = mask[..., :num_slots] if mask.dtype == torch.bool else mask[..., :num_slots] > torch.finfo(mask.dtype).min / 2
    return (visible == expected) | (queries[:, None] < first)


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
