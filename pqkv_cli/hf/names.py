"""What transformers calls the cache among arguments: `cache` from 5.24 on, `past_key_values` before."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

CACHE_KEYWORDS = ("cache", "past_key_values")  # the newest name first


def cache_keyword(model: Any) -> str:
    """Return the name under which `model`, a model or its forward, takes a cache; its ``generate`` takes the same.

    A wrapper whose own signature does not say is asked for the model inside it.
    """
    forwards = [model] if not isinstance(model, nn.Module) else [model.forward, getattr(model, "base_model", model).forward]
    for forward in forwards:
        known = inspect.signature(forward).parameters
        for name in CACHE_KEYWORDS:
            if name in known:
                return name
    return CACHE_KEYWORDS[-1]  # understood by all versions up to 6.0


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands `cache` to ``model(...)`` or ``model.generate(...)``."""
    return {cache_keyword(model): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the `arguments` of a forward, under whichever name; None where there is none."""
    return next((arguments[name] for name in CACHE_KEYWORDS if arguments.get(name) is not None), None)


def forward_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``module.forward`` by name, those that its ``**kwargs`` take among them."""
    signature = inspect.signature(module.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = {**given.pop(name, {}), **given}
    return given
