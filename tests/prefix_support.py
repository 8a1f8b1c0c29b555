"""What the tests of stored prefixes share: caches that read texts in steps, and how they go on."""

from collections.abc import Sequence
from typing import Any

import torch

from pqkv_cli.runtime import Attached


@torch.no_grad()
def read(attached: Attached, cache: Any, ids: torch.Tensor, steps: Sequence[int] | None = None) -> torch.Tensor:
    """Let the model read `ids` [B, T] in `steps`, by default one, and return all logits [B, T, V]."""
    pieces = ids.split(list(steps) if steps else [ids.shape[1]], dim=1)
    return torch.cat([attached.model(each, past_key_values=cache, use_cache=True).logits for each in pieces], dim=1)


def filled(attached: Attached, ids: torch.Tensor, steps: Sequence[int] | None = None) -> Any:
    """Return a new cache that has read `ids` in `steps`."""
    cache = attached.new_cache()
    read(attached, cache, ids, steps)
    return cache


def goes_on(attached: Attached, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return what ``generate`` makes of the whole text `ids` [1, T], whose first tokens `cache` holds."""
    torch.manual_seed(5)
    settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings |= options
    if "attention_mask" not in settings:
        settings["attention_mask"] = torch.ones_like(ids)
    made: torch.Tensor = attached.model.generate(ids, past_key_values=cache, **settings)
    return made
