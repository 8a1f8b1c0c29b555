"""From a transformers config to the shape of the model's cache. Knows configs; loads no weights."""

from collections import Counter
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.config_reader import read, read_count
from pqkv_cli.models.families import LATENT_REASON, FamilyFacts, family
from pqkv_cli.models.rope_facts import rope_facts
from pqkv_cli.specs import LayerGeometry, ModelGeometry


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
    layers, notes = [], []
    for index, kind in enumerate(layer_types(text)):
        num_heads, num_kv_heads, head_dim = _heads(layer_config(text, index))
        rope = rope_facts(text, facts, index, kind, head_dim)
        layers.append(LayerGeometry(num_heads, num_kv_heads, head_dim, rope.rotary, _dense_reason(text, index, kind)))
        notes.append(rope.note)
    sources = tuple(kv_source(text, index) for index in range(len(layers)))
    max_positions = read(text, "max_position_embeddings", int, 0)
    return ModelGeometry(str(text.model_type), tuple(layers), max_positions, facts.decoded, tuple(notes), sources)


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
        return LATENT_REASON
    if getattr(text, "num_attention_heads", None) is None:
        return "it has no attention keys and values (its config has no 'num_attention_heads')"
    known = {name, str(config.model_type)} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return "" if known or getattr(config, "auto_map", None) else "it is not a causal language model"


def layer_config(text: Any, index: int) -> Any:
    """Return what `text` says about one layer: itself, except where layers differ in shape."""
    return text.per_layer_config[index] if getattr(text, "is_heterogeneous", False) else text


def kv_source(text: Any, index: int) -> int:
    """Return the layer whose cache layer `index` reads: itself, except where the last layers share earlier caches."""
    kinds = layer_types(text)
    num_own = len(kinds) - read(text, "num_kv_shared_layers", int, 0)
    if index < num_own:
        return index
    return max((i for i in range(num_own) if kinds[i] == kinds[index]), default=index)


def _heads(config: Any) -> tuple[int, int, int]:
    """Return query heads, key/value heads and head_dim."""
    num_heads = read_count(config, "num_attention_heads")
    num_kv_heads = read_count(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"the model's config has {num_heads} query heads and {num_kv_heads} key/value heads; "
            "expected a multiple. Check config.json against the model's original."
        )
    if getattr(config, "head_dim", None) is not None:
        return num_heads, num_kv_heads, read_count(config, "head_dim")
    hidden = read_count(config, "hidden_size")
    if hidden % num_heads:
        raise ModelError(
            f"hidden_size {hidden} is not divisible by {num_heads} heads and the model's config has no 'head_dim'. "
            "Check config.json against the model's original."
        )
    return num_heads, num_kv_heads, hidden // num_heads


def _dense_reason(text: Any, index: int, kind: str) -> str:
    source = kv_source(text, index)
    if source != index:
        return f"it keeps no cache and reads that of layer {source}"
    if kind == "full_attention":
        return ""
    if kind == "sliding_attention":
        return f"sliding window of {getattr(text, 'sliding_window', None)} tokens"
    if kind == "chunked_attention":
        return f"attention in chunks of {getattr(text, 'attention_chunk_size', None)} tokens"
    return f"layer type {kind} keeps no growing cache of keys and values"
