"""From a transformers config to the shape of the model's cache. Knows configs; loads no weights."""

from collections import Counter
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.config_reader import read, read_count
from pqkv_cli.models.families import FIXED_ROPE_TYPES, FamilyFacts, family
from pqkv_cli.specs import LayerGeometry, ModelGeometry
from pqkv_kernels.layout import RotaryLayout


def geometry(config: PretrainedConfig) -> ModelGeometry:
    """Return the geometry of the decoder that `config` describes.

    ``max_positions`` is 0 where the config names none. A layer's ``rotary`` is None where its keys must be coded as the
    cache sees them: no rotary embedding, one whose frequencies change with the length, or one that cannot be undone.

    Raises
    ------
    UnsupportedModelError
        If the model is no decoder with attention keys and values of one size per head; the message says why.
    ModelError
        If the config lacks a value or has one of a wrong type.
    """
    text = text_config(config)
    facts = family(str(text.model_type))
    _refuse(config, text, facts)
    num_heads = read_count(text, "num_attention_heads")
    num_kv_heads = read_count(text, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"the model's config has {num_heads} query heads and {num_kv_heads} key/value heads; "
            "expected a multiple. Check config.json against the model's original."
        )
    head_dim = _head_dim(text, num_heads)
    layers = tuple(
        LayerGeometry(num_heads, num_kv_heads, head_dim, _rotary(text, facts, i, kind, head_dim), _dense_reason(text, kind))
        for i, kind in enumerate(layer_types(text))
    )
    return ModelGeometry(str(text.model_type), layers, read(text, "max_position_embeddings", int, 0))


def check_quantizable(model: ModelGeometry) -> None:
    """Refuse a model without a single layer whose cache can be quantized.

    Raises
    ------
    UnsupportedModelError
        If every layer must stay dense; the message counts the reasons.
    """
    reasons = Counter(layer.dense_reason for layer in model.layers)
    if not reasons[""]:
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common() if reason) or "it has no layers"
        raise UnsupportedModelError(
            f"this {model.model_type} model has no layer to quantize ({listed}); expected at least one full-attention layer. "
            "Choose a model with full attention."
        )


def text_config(config: PretrainedConfig) -> Any:
    """Return the part of `config` that describes the text decoder."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def layer_types(text: Any) -> tuple[str, ...]:
    """Return the kind of every layer, by the rule transformers uses to build its cache.

    Raises
    ------
    ModelError
        If the listed kinds are not one per layer.
    """
    num_layers = read_count(text, "num_hidden_layers")
    listed = getattr(text, "layer_types", None)
    if listed is None:
        if getattr(text, "sliding_window", None) is not None:
            return ("sliding_attention",) * num_layers
        if getattr(text, "attention_chunk_size", None) is not None:
            return ("chunked_attention",) * num_layers
        return ("full_attention",) * num_layers
    if len(listed) != num_layers:
        raise ModelError(
            f"the model's config lists {len(listed)} layer_types for num_hidden_layers {num_layers}; expected one per layer. "
            "Check config.json against the model's original."
        )
    return tuple(map(str, listed))


def _refuse(config: PretrainedConfig, text: Any, facts: FamilyFacts) -> None:
    if reason := _unsupported_reason(config, text, facts):
        raise UnsupportedModelError(
            f"{text.model_type} models cannot be quantized: {reason}. Expected a decoder-only language model with "
            "attention keys and values, for example llama, mistral or qwen."
        )


def _unsupported_reason(config: PretrainedConfig, text: Any, facts: FamilyFacts) -> str:
    name = str(text.model_type)
    if facts.unsupported:
        return facts.unsupported
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False):
        return "it is an encoder, which keeps no cache"
    if getattr(text, "kv_lora_rank", None) is not None:
        return "its cache holds one latent vector per token (multi-head latent attention), which is not handled yet"
    if getattr(text, "is_heterogeneous", False):
        return "its layers differ in shape, which is not handled yet"
    if getattr(text, "num_attention_heads", None) is None:
        return "it has no attention keys and values (its config has no 'num_attention_heads')"
    known = {name, str(config.model_type)} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return "" if known or getattr(config, "auto_map", None) else "it is not a causal language model"


def _head_dim(text: Any, num_heads: int) -> int:
    if getattr(text, "head_dim", None) is not None:
        return read_count(text, "head_dim")
    hidden = read_count(text, "hidden_size")
    if hidden % num_heads:
        raise ModelError(
            f"hidden_size {hidden} is not divisible by {num_heads} heads and the model's config has no 'head_dim'. "
            "Check config.json against the model's original."
        )
    return hidden // num_heads


def _dense_reason(text: Any, kind: str) -> str:
    if kind == "full_attention":
        return ""
    if kind == "sliding_attention":
        return f"sliding window of {getattr(text, 'sliding_window', None)} tokens"
    if kind == "chunked_attention":
        return f"attention in chunks of {getattr(text, 'attention_chunk_size', None)} tokens"
    return f"layer type {kind} keeps no growing cache of keys and values"


def _rotary(text: Any, facts: FamilyFacts, index: int, kind: str, head_dim: int) -> RotaryLayout | None:
    parameters = _rope_parameters(text, kind)
    if not parameters or facts.unrotatable or _is_nope(text, facts, index, kind):
        return None
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    # Sections of the angles then belong to different axes of an image position.
    if rope_type not in FIXED_ROPE_TYPES or "mrope_section" in parameters:
        return None
    factor = parameters.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    rotary_dim = head_dim if factor is None or rope_type == "proportional" else int(head_dim * factor)
    return RotaryLayout(rotary_dim, facts.interleaved) if rotary_dim >= 2 and rotary_dim % 2 == 0 else None


def _rope_parameters(text: Any, kind: str) -> dict[str, Any]:
    parameters = read(text, "rope_parameters", dict, {})
    if getattr(text, "alibi", False):
        return {}
    nested = any(isinstance(value, dict) for value in parameters.values()) and "rope_type" not in parameters
    return (parameters.get(kind) or {}) if nested else parameters


def _is_nope(text: Any, facts: FamilyFacts, index: int, kind: str) -> bool:
    if facts.nope == "no_rope_layers":
        listed = read(text, "no_rope_layers", list, [])
        return bool(listed) and not listed[index]  # The list names the layers that DO rotate, whatever it is called.
    if facts.nope == "full_attention":
        return kind == "full_attention"
    hybrid = getattr(text, "sliding_window", None) is not None
    return facts.nope == "full_attention_of_hybrid" and hybrid and kind == "full_attention"
