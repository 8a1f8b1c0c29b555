"""Observing what attention sees, without touching it. Knows the attention interface of transformers; no statistics.

The model's attention function is replaced by one that calls the former one and then shows its arguments to the observer,
under a name of its own, so no other model of the process is affected. The masks are those of the former function.
Taps nest: each calls what it found, and must be left in the reverse order (as ``with`` does).
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.attention import AttentionArguments, read_arguments
from pqkv_cli.hf.modules import attention_modules, forward_globals, uses_interface

_SERIAL = itertools.count()


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The arguments of one attention call.

    Attributes
    ----------
    queries
        [B, H, T, D], after rotary embedding.
    keys, values
        [B, Hkv, S, D], keys after rotary embedding; S > T when a cache holds earlier tokens.
    cos, sin
        As the model gave them to the attention module, [B or 1, T, rotary_dim]; None where it gave no such pair.
    arguments
        What attention does beside the softmax of scaled products.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    arguments: AttentionArguments


class Observer(Protocol):
    """Whoever wants to see attention calls. It must not write to the tensors it is shown."""

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        """Look at one call of the layer's attention function, under ``torch.no_grad``."""


@contextmanager
def tap(model: nn.Module, observer: Observer, *, differentiable: bool = False) -> Iterator[None]:
    """Show every attention call of `model` to `observer` while the context lasts; outputs stay bit-equal.

    If `differentiable`, the keys and values shown are parts of the graph that autograd records of the model: gradients for
    them can be asked for afterwards, whether or not parameters have any.

    Raises
    ------
    UnsupportedModelError
        If the attention modules do not go through the attention interface of transformers.
    """
    modules = attention_modules(model)
    for module in modules.values():
        _check_interface(module)
    taps = _Taps({id(module): index for index, module in modules.items()}, observer, differentiable)
    with ExitStack() as undo:
        for module in modules.values():
            undo.callback(module.register_forward_pre_hook(taps.angle_hook(module), with_kwargs=True).remove)
        # Layers usually share one config object; those with the same former function need one entry.
        configs: dict[int, Any] = {id(module.config): module.config for module in modules.values()}
        names: dict[str, str] = {}
        for config in configs.values():
            former = str(config._attn_implementation_internal)
            if former not in names:
                names[former] = _register(taps, former, undo)
            undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = names[former]
        yield


class _Taps:
    """The state of one `tap`: which module is which layer, and the angles it was last given."""

    def __init__(self, layer_of: dict[int, int], observer: Observer, differentiable: bool) -> None:
        self._layer_of = layer_of
        self._observer = observer
        self._differentiable = differentiable
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def angle_hook(self, module: nn.Module) -> Callable[..., None]:
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}.get("position_embeddings")
            self._angles.pop(id(module), None)
            if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(t, torch.Tensor) for t in given):
                self._angles[id(module)] = (given[0], given[1])

        return hook

    def function(self, former: str) -> Callable[..., Any]:
        def attention(module: nn.Module, queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            layer_index = self._layer_of.get(id(module))
            if self._differentiable and layer_index is not None:
                # In place: layers that share keys and values must go on sharing them.
                for tensor in (keys, values):
                    if not tensor.requires_grad:
                        tensor.requires_grad_()
            output = _former_function(module, former)(module, queries, keys, values, *args, **kwargs)
            if layer_index is not None:
                cos, sin = self._angles.pop(id(module), (None, None))
                arguments = read_arguments(module, queries, kwargs.pop("scaling", None), _optional(kwargs))
                step = AttentionStep(queries, keys, values, cos, sin, arguments)
                with torch.no_grad():
                    self._observer.attention(layer_index, step)
            return output

        return attention


def _optional(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that have no place of their own in every attention function."""
    return {name: value for name, value in keywords.items() if name not in ("attention_mask", "dropout")}


def _register(taps: _Taps, former: str, undo: ExitStack) -> str:
    # The former name stays inside: transformers asks for "flash" in the name where masks depend on it.
    name = f"pqkv_tap_{next(_SERIAL)}_{former}"
    AttentionInterface.register(name, taps.function(former))
    undo.callback(AttentionInterface._global_mapping.pop, name, None)
    mask: Any = AttentionMaskInterface._global_mapping.get(former)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
        undo.callback(AttentionMaskInterface._global_mapping.pop, name, None)
    return name


def _former_function(module: nn.Module, former: str) -> Callable[..., Any]:
    # "eager" is in no registry: it is what the model's own file falls back to.
    names = forward_globals(module)
    function: Callable[..., Any] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(former, names.get("eager_attention_forward"))
    return function


def _check_interface(module: nn.Module) -> None:
    names = forward_globals(module)
    config = getattr(module, "config", None)
    former = getattr(config, "_attn_implementation_internal", None)
    if not uses_interface(module) or config is None or former is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not use the attention interface of transformers, so its keys cannot be observed; "
            "expected a model that does. Choose a newer implementation of this architecture."
        )
    if former == "eager" and "eager_attention_forward" not in names:
        raise UnsupportedModelError(
            f"the eager attention of {type(module).__name__} cannot be found, so it cannot be observed; "
            "load the model with attn_implementation='sdpa'."
        )
