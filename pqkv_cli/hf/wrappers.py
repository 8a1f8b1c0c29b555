"""Finds the transformers model inside what others wrap around one. Knows accelerate's and peft's wrappers; changes nothing."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from pqkv_cli.errors import UnsupportedModelError, UsageError

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # by name: torch can be built without them


def inner_model(model: Any) -> PreTrainedModel:
    """Return the transformers model that `model` is or wraps: compiled, parallel, or with an adapter of peft.

    Its hooks then run whichever of the two is called.

    Raises
    ------
    UsageError
        If there is none where it is looked for; the message names one that lies elsewhere.
    UnsupportedModelError
        If the wrapper changes what the model is given, or holds only shards of its weights.
    """
    inner = model
    while True:
        if any(_SHARDED & {kind.__name__ for kind in type(part).__mro__} for part in _modules(inner)):
            raise UnsupportedModelError(
                "the model is wrapped in FullyShardedDataParallel and holds shards of its weights; expected a whole model: "
                "attach before wrapping, or load it with device_map"
            )
        found = _unwrapped(inner)
        if found is inner:
            break
        inner = found
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(_explanation(inner))
    return inner


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _unwrapped(model: Any) -> Any:
    """Return what lies one wrapper further inside, `model` itself where nothing does."""
    # A model with compiled layers is one itself, and the one that it was made from shares its parts but is not what is called.
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return model
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if inner is not model:
        return inner
    adapted = getattr(type(model), "get_base_model", None)
    if adapted is None:
        return model
    if _learns_prompts(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} puts learned tokens in front of every prompt, whose keys and values no artifact knows; "
            "expected an adapter that changes weights, such as LoRA, or the model without it"
        )
    return model.get_base_model()


def _learns_prompts(model: Any) -> bool:
    try:
        return bool(getattr(model.active_peft_config, "is_prompt_learning", False))
    except (AttributeError, KeyError, ValueError):  # no adapter is left
        return False


def _explanation(model: Any) -> str:
    inside = [
        name
        for name, part in (model.named_modules() if isinstance(model, nn.Module) else ())
        if name and isinstance(part, PreTrainedModel)
    ]
    way = f"of this one give its .{inside[0]}" if inside else "of a pipeline give pipeline.model"
    return (
        f"the model is a {type(model).__name__}; expected a causal language model of transformers, as "
        f"AutoModelForCausalLM.from_pretrained returns it: {way}"
    )
