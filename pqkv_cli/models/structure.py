"""Does attention get what the config promises? The empty model is called once, before weights or text are read."""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from pqkv_cli.errors import PqkvError, UnsupportedModelError
from pqkv_cli.hf.modules import attention_modules, output_projection, uses_interface
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.footprint import empty_model
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_module
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


def check_structure(config: PretrainedConfig) -> None:
    """Refuse a model that would be found unfit only after text was run through it.

    Raises
    ------
    UnsupportedModelError
        If transformers loads no language model for it, an attention module, its output projection or its rotary module is not
        found, attention does not go through the interface of transformers or is given other shapes than the config says, or the
        base model is not what the model calls.
    ModelError
        If transformers cannot build the model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{config.model_type} models cannot be quantized: transformers has no language model alone for them "
            "(AutoModelForCausalLM does not load them), as is the case with many that read images or sound. Expected a model "
            "for text: name the checkpoint of its language model, if there is one."
        )
    model, shape = empty_model(config), geometry(config)
    attention = attention_modules(model)
    for module in attention.values():
        if not uses_interface(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} does not use the attention interface of transformers, so its keys cannot be "
                "observed; expected a model that does. Choose a newer implementation of this architecture."
            )
    for index, layer in enumerate(shape.layers):
        if layer.dense_reason:
            continue
        if index not in attention:
            raise UnsupportedModelError(
                f"layer {index} of {type(model).__name__} has no attention module that knows its layer; expected one with "
                "'layer_idx'. This architecture is not handled yet."
            )
        output_projection(attention[index])
        if layer.rotary is not None:
            rotary_module(model, index)
    check_first_step(model, shape)
