"""Can the model that a config describes be observed and prepared? Asks its empty modules, before weights or text are read."""

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.modules import attention_modules, output_projection, uses_interface
from pqkv_cli.models.footprint import empty_model
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_module


class _ReachedError(Exception):
    """The base model was called."""


def check_structure(config: PretrainedConfig) -> None:
    """Refuse a model that would be found unfit only after text was run through it.

    Raises
    ------
    UnsupportedModelError
        If transformers loads no language model for it, an attention module, its output projection or its rotary module is not
        found, attention does not go through the interface of transformers, or the base model is not what the model calls.
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
    _check_base_is_called(model)


def _check_base_is_called(model: Any) -> None:
    """Refuse a model whose forward goes past its base model, where the hook that knows positions sits."""

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _ReachedError

    handle = model.base_model.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        with torch.no_grad(), torch.device("meta"):
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device="meta"))
    except _ReachedError:
        return
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason is given"])[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called with tokens alone ({reason}); expected a language model that reads text. "
            "Choose another model."
        ) from error
    finally:
        handle.remove()
    raise UnsupportedModelError(
        f"{type(model).__name__} does not call its base model ({type(model.base_model).__name__}) but parts of it, so "
        "positions cannot be told to the cache; expected a model that does. This architecture is not handled yet."
    )
