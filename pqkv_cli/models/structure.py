"""Can the model that a config describes be observed and prepared? Asks its empty modules, before weights or text are read."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.modules import attention_modules, output_projection, uses_interface
from pqkv_cli.models.first_step import check_first_step
from pqkv_cli.models.footprint import empty_model
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_module


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
