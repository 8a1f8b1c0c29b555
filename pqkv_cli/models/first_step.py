"""Does attention get what the config promises? The empty model is called once, before weights or text are read."""

from typing import Any

import torch
from torch import nn

from pqkv_cli.errors import PqkvError, UnsupportedModelError
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.specs import LayerGeometry, ModelGeometry


class _EnoughError(Exception):
    """One layer of every shape was seen."""


class _Shapes:
    """Compares what attention is given with the geometry, until a layer of every shape was seen."""

    def __init__(self, shape: ModelGeometry) -> None:
        self._shape = shape
        self._awaited = {layer for layer in shape.layers if not layer.dense_reason}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        layer = self._shape.layers[layer_index]
        if not layer.dense_reason:
            check_shapes(layer_index, layer, step)
            self._awaited.discard(layer)
        if not self._awaited:
            raise _EnoughError


def check_shapes(index: int, layer: LayerGeometry, step: AttentionStep) -> None:
    """Refuse attention of other shapes than the config says.

    Raises
    ------
    UnsupportedModelError
        If layer `index` has other heads or channels than `layer`.
    """
    found = (step.queries.shape[1], step.keys.shape[1], step.keys.shape[3], step.values.shape[3])
    expected = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.head_dim)
    if found != expected:
        raise UnsupportedModelError(
            f"layer {index} attends with (query heads, kv heads, key dim, value dim) {found}; expected {expected} "
            "from its config. This architecture is not handled yet."
        )


@torch.no_grad()
def check_first_step(model: Any, shape: ModelGeometry) -> None:
    """Call `model`, whose weights are on the device ``meta``, and refuse what shows in its attention and not in its config.

    Raises
    ------
    UnsupportedModelError
        If the base model is not what the model calls, attention has other shapes than `shape` or is given unknown keywords,
        or its arguments cannot be observed.
    """
    base, reached = model.base_model, set[nn.Module]()
    model.eval()
    handles = [part.register_forward_pre_hook(lambda module, args: reached.add(module)) for part in base.modules()]
    failure: Exception | None = None
    try:
        with torch.device("meta"), tap(model, _Shapes(shape)):
            # With a cache, because without one some look at values, and there are none.
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device="meta"), use_cache=True)
    except (_EnoughError, PqkvError) as error:
        if isinstance(error, PqkvError):
            raise
    except Exception as error:  # not every model can do without values, and what it was seen to do until then is right
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    if base in reached:
        return
    if failure is not None and not reached:
        reason = (str(failure).splitlines() or ["no reason is given"])[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called with tokens alone ({reason}); expected a language model that reads "
            "text. Choose another model."
        ) from failure
    raise UnsupportedModelError(
        f"{type(model).__name__} does not call its base model ({type(base).__name__}) but parts of it, so "
        "positions cannot be told to the cache; expected a model that does. This architecture is not handled yet."
    )
