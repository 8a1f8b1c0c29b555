"""Tells a cache the positions and the padding of every step, through a hook on the model. Knows no attention.

``Cache.update`` is given neither. The hook sits on the base model, where all callers' arguments arrive by name.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from pqkv_cli.cache.cache import TimedCache
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.names import forward_arguments, given_cache
from pqkv_cli.models.geometry import text_config


def install_step_hook(model: Any) -> RemovableHandle:
    """Make `model` tell every `TimedCache` it is called with about each step; remove the handle to undo it."""
    max_positions = getattr(text_config(model.config), "max_position_embeddings", None)
    hook = partial(_begin_step, max_positions if isinstance(max_positions, int) else None)
    handle: RemovableHandle = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return handle


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin_step(max_positions: int | None, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = forward_arguments(module, args, kwargs)
    cache = given_cache(arguments)
    if not isinstance(cache, TimedCache) or cache.stands:
        return
    cache.check_owner(module)
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    batch, num_new = tokens.shape[:2]
    num_past = cache.get_seq_length()
    if max_positions is not None and num_past + num_new > max_positions:
        cache.timeline.notices.once(
            "long",
            f"the text reaches {num_past + num_new} tokens and the model was made for {max_positions}; "
            "what it says beyond them is not to be trusted: shorten the prompt, or ask for fewer new tokens",
        )
    positions = step_positions(arguments.get("position_ids"), batch, num_new, num_past, tokens.device)
    cache.begin_step(positions, row_starts(arguments.get("attention_mask"), batch, num_past + num_new))


def step_positions(
    position_ids: torch.Tensor | None, batch: int, num_new: int, num_past: int, device: torch.device
) -> torch.Tensor:
    """Return the positions [B, T] int64 of a step's tokens, as the model itself will understand its arguments.

    Raises
    ------
    CacheError
        If the model is called with positions of more than one axis.
    """
    if position_ids is None:
        position_ids = torch.arange(num_past, num_past + num_new, device=device)[None]
    if position_ids.ndim != 2:
        raise CacheError(
            f"position_ids have shape {list(position_ids.shape)}; expected [batch, tokens]: "
            "models with positions of several axes are not supported"
        )
    return position_ids.expand(batch, num_new)


def row_starts(attention_mask: Any, batch: int, num_slots: int) -> torch.Tensor | None:
    """Return the first real slot of each row, [B] int64, or None where there is no mask.

    Raises
    ------
    CacheError
        If the mask is not [B, num_slots] with all padding on the left.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != (batch, num_slots):
        found = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise CacheError(
            f"attention_mask is {found}; expected [{batch}, {num_slots}], one row per sequence over all cached and new tokens"
        )
    padding = attention_mask == 0
    starts = padding.long().cumprod(dim=1).sum(dim=1)
    left_only = padding.sum(dim=1) == starts
    # Without a mask, generate() takes every pad token for padding, those of an earlier turn's answer too.
    message = (
        "attention_mask has padding after real tokens; expected left padding: set tokenizer.padding_side = 'left', or give "
        "attention_mask=torch.ones_like(input_ids) where tokens that look like padding belong to the text"
    )
    if padding.is_cuda:
        torch._assert_async(left_only.all(), message)  # no host synchronization in the middle of decoding
    elif not bool(left_only.all()):
        raise CacheError(message)
    return starts
