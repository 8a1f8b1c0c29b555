"""Tells a cache the positions and the padding of every step, through hooks on the model. Knows no attention.

``Cache.update`` is given neither. The step hook sits on the base model, where all callers' arguments arrive by name.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache

from pqkv_cli.errors import CacheError, PqkvError
from pqkv_cli.hf.configs import position_limit, text_config
from pqkv_cli.hf.names import CACHE_KEYWORDS, cache_keyword, forward_arguments, given_cache

_num_hooked: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()
_former_generate: "WeakKeyDictionary[Any, Callable[..., Any] | None]" = WeakKeyDictionary()
# What to do with a cache that holds a text already.
NEXT_TEXT = (
    "give generate() the whole text with use_cache=True, of which it reads what is new; before another text call cache.reset()"
)


class SteppedCache(Cache):
    """A cache that must know every step before its layers are updated. What it does with that is for classes below."""

    stands = False  # while a step is captured, which was begun already and changes nothing that the host knows

    def check_owner(self, model: torch.nn.Module) -> None:
        """Refuse another base model than the one this cache is for."""
        raise NotImplementedError

    def begin_step(self, positions: torch.Tensor, row_start: torch.Tensor | None) -> None:
        """Take positions [B, T] of the tokens to come, and the first real slots [B] of the rows or None if unchanged."""
        raise NotImplementedError

    def warn_once(self, key: str, text: str) -> None:
        """Warn with `text`, once in the life of the cache under `key`."""
        raise NotImplementedError


class StepHooks:
    """What was put on a model; `remove` takes it off again."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def add(self, undo: Callable[..., Any], *arguments: Any) -> None:
        """Remember what to call."""
        self._undo.callback(undo, *arguments)

    def remove(self) -> None:
        """Leave the model as it was; harmless when repeated."""
        self._undo.close()


def install_step_hook(model: Any) -> StepHooks:
    """Make `model` tell every `SteppedCache` it is called with about each step.

    Until the hooks are removed its ``forward`` and its ``generate`` take such a cache under its old name and its new one, and
    ``generate`` uses it whatever the settings of the checkpoint say: with ``use_cache`` false every step would read the whole
    text again and append it, and a kind of cache that they name would be refused beside it.
    """
    hooks = StepHooks()
    rename = partial(_rename_cache, cache_keyword(model))
    hooks.add(model.register_forward_pre_hook(rename, with_kwargs=True).remove)
    limit = position_limit(model.config)
    begin = partial(_begin_step, limit if isinstance(limit, int) else None)
    hooks.add(model.base_model.register_forward_pre_hook(begin, with_kwargs=True).remove)
    _use_caches(model, hooks)
    return hooks


def _rename_cache(
    keyword: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not any(name in kwargs for name in CACHE_KEYWORDS if name != keyword):
        return None
    return args, _under_its_name(keyword, kwargs)


def _under_its_name(keyword: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `kwargs` with the cache, of whatever kind, under the name `keyword` alone."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_KEYWORDS}
    return others | {keyword: given_cache(kwargs)}


def _use_caches(model: Any, hooks: StepHooks) -> None:
    """Let ``model.generate`` use the caches that it is given."""
    if not callable(getattr(model, "generate", None)):
        return
    _num_hooked[model] = _num_hooked.get(model, 0) + 1
    if _num_hooked[model] == 1:
        former = vars(model).get("generate")
        # A method, not a closure: a copy of the model generates with itself.
        model.generate = MethodType(_generate if former is None else partial(_generate_by, former), model)
        _former_generate[model] = former
    hooks.add(_leave_generate, model)
    for config in (model.config, text_config(model.config), model.generation_config):
        if getattr(config, "use_cache", None) is False:
            config.use_cache = True
            hooks.add(setattr, config, "use_cache", False)


def _leave_generate(model: Any) -> None:
    """Give the model its own ``generate`` back when the last of those who need ours has gone, in whatever order they go."""
    _num_hooked[model] -= 1
    if _num_hooked[model]:
        return
    former = _former_generate.pop(model)
    del model.generate, _num_hooked[model]
    if former is not None:
        model.generate = former


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    return _generate_by(type(model).generate.__get__(model), model, *args, **kwargs)


def _generate_by(generate: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    # The name of any cache: a warning about an old one would name this file.
    if not kwargs.keys().isdisjoint(CACHE_KEYWORDS):
        kwargs = _under_its_name(cache_keyword(model), kwargs)
    if isinstance(given_cache(kwargs), SteppedCache):
        kwargs["use_cache"] = True
        settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        if getattr(settings, "cache_implementation", None) is not None:
            kwargs.setdefault("cache_implementation", None)
    return generate(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin_step(max_positions: int | None, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = forward_arguments(module, args, kwargs)
    cache = given_cache(arguments)
    if not isinstance(cache, SteppedCache) or cache.stands:
        return
    cache.check_owner(module)
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    batch, num_new = tokens.shape[:2]
    num_past = cache.get_seq_length()
    if not num_new:
        raise CacheError(f"no token is left behind the {num_past} that the cache holds; expected a longer text: {NEXT_TEXT}")
    if max_positions is not None and num_past + num_new > max_positions:
        cache.warn_once(
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
        If the model is called with positions of more than one axis, or not one for every token.
    """
    if position_ids is None:
        position_ids = torch.arange(num_past, num_past + num_new, device=device)[None]
    if position_ids.ndim != 2:
        raise CacheError(
            f"position_ids have shape {list(position_ids.shape)}; expected [batch, tokens]: "
            "models with positions of several axes are not supported"
        )
    if position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != num_new:
        raise CacheError(
            f"position_ids have shape {list(position_ids.shape)}; expected [{batch}, {num_new}], one for every new token"
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
            f"attention_mask is {found}; expected [{batch}, {num_slots}], one row per sequence over all cached and new tokens: "
            f"{NEXT_TEXT}"
        )
    padding = attention_mask == 0
    starts = padding.long().cumprod(dim=1).sum(dim=1)
    left_only = padding.sum(dim=1) == starts
    # Without a mask, generate() takes every pad token for padding, those of an earlier turn's answer too.
    message = (
        "attention_mask has padding after real tokens; expected left padding: set tokenizer.padding_side = 'left', or give "
        "attention_mask=torch.ones_like(input_ids) where tokens that look like padding belong to the text"
    )
    require(left_only, message)
    return starts


def require(conditions: torch.Tensor, message: str, error: type[PqkvError] = CacheError) -> None:
    """Refuse where not all `conditions` hold; on a GPU the device itself stops, so that decoding need not wait for its answer.

    Raises
    ------
    PqkvError
        Of the kind `error`, with `message`, for conditions on the CPU.
    """
    if conditions.is_cuda:
        torch._assert_async(conditions.all(), message)
    elif not bool(conditions.all()):
        raise error(message)
