"""From a config to the shape of every layer's cache and how its keys are rotated. Knows configs only."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.hf.configs import (
    is_encoder,
    is_language_model,
    layer_config,
    layer_kind,
    layer_values,
    position_limit,
    present_name,
    read,
    read_count,
    text_config,
)
from pqkv_cli.models.families import ASSISTANT_REASON, FIXED_ROPE_TYPES, LATENT_REASON, FamilyFacts, family
from pqkv_cli.specs import LayerGeometry, ModelGeometry
from pqkv_kernels.format.layout import RotaryLayout


@dataclass(frozen=True, slots=True)
class RopeFacts:
    """Rotary embedding of one layer.

    Attributes
    ----------
    rotary
        How to un-rotate keys before they are coded; None where they are coded as the cache sees them.
    note
        Why `rotary` is None; empty where it is not.
    """

    rotary: RotaryLayout | None
    note: str = ""


def rope_facts(text: Any, facts: FamilyFacts, index: int, kind: str, head_dim: int) -> RopeFacts:
    """Return the facts of layer `index` of kind `kind` in the decoder config `text`."""
    parameters = _parameters(text, kind)
    if not parameters or _is_nope(text, facts, index, kind):
        return RopeFacts(None, "its keys have no rotary embedding")
    coded_after = "its keys are coded after rotary embedding, and codes hold best at the positions of calibration: "
    if facts.unrotatable:
        return RopeFacts(None, coded_after + facts.unrotatable)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in FIXED_ROPE_TYPES:
        return RopeFacts(None, f"{coded_after}the frequencies of {rope_type} embedding change with the length of the text")
    # Sections of the angles then belong to different axes of an image position.
    if "mrope_section" in parameters:
        return RopeFacts(None, f"{coded_after}its positions have several axes")
    factor = parameters.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    rotary_dim = head_dim if factor is None or rope_type == "proportional" else int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        return RopeFacts(None, f"{coded_after}{rotary_dim} channels do not form pairs")
    return RopeFacts(RotaryLayout(rotary_dim, facts.interleaved))


def _parameters(text: Any, kind: str) -> dict[str, Any]:
    parameters = read(text, "rope_parameters", dict, {})
    if getattr(text, "alibi", False):
        return {}
    nested = any(isinstance(value, dict) for value in parameters.values()) and "rope_type" not in parameters
    found: dict[str, Any] = (parameters.get(kind) or {}) if nested else parameters
    # A base of None is how configs say that nothing is rotated.
    return {} if "rope_theta" in found and found["rope_theta"] is None else found


def _is_nope(text: Any, facts: FamilyFacts, index: int, kind: str) -> bool:
    bases = read(text, "layer_rope_theta", list, [])
    if index < len(bases) and not bases[index]:
        return True
    if facts.nope == "no_rope_layers":
        listed = read(text, "no_rope_layers", list, [])
        return bool(listed) and not listed[index]  # The list names the layers that DO rotate, whatever it is called.
    if facts.nope == "position_embedding_type":
        return getattr(text, "position_embedding_type", None) != "rope"
    if kind != "full_attention" or _rotates_dense_prefix(text, index):
        return False
    if facts.nope == "full_attention":
        return True
    return facts.nope == "full_attention_of_hybrid" and getattr(layer_config(text, index), "sliding_window", None) is not None


def _rotates_dense_prefix(text: Any, index: int) -> bool:
    """Return whether a layer of Command A's mixtures of experts rotates although it attends to all tokens."""
    experts = getattr(text, "mlp_layer_types", None) or ()
    is_dense = index < len(experts) and experts[index] == "dense"
    return is_dense and getattr(text, "prefix_dense_sliding_window_pattern", None) == 1


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
    layers, notes, channels = [], [], []
    for index, kind in enumerate(layer_types(text)):
        num_heads, num_kv_heads, head_dim = _heads(layer_config(text, index))
        rope = rope_facts(text, facts, index, kind, head_dim)
        reason = _dense_reason(text, index, kind)
        layers.append(LayerGeometry(num_heads, num_kv_heads, head_dim, rope.rotary, reason))
        notes.append("" if reason else rope.note)
        keeps = kv_source(text, index) == index and layer_kind(kind).growth in ("tokens", "window")
        channels.append(2 * num_kv_heads * head_dim if keeps else 0)
    sources = tuple(kv_source(text, index) for index in range(len(layers)))
    return ModelGeometry(
        str(text.model_type), tuple(layers), num_positions(text), facts.decoded, tuple(notes), sources, tuple(channels)
    )


def num_positions(config: Any) -> int:
    """Return how many positions the decoder that `config` describes has, 0 where it names no limit.

    The one source of this number: in composite configs only the part of the text decoder has it.

    Raises
    ------
    ModelError
        If the number is not one.
    """
    text = text_config(config)
    return 0 if position_limit(config) is None else read(text, "max_position_embeddings", int)


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
        return tuple(_type_of(layer_config(text, index)) for index in range(num_layers))
    if len(listed) != num_layers:
        raise ModelError(
            f"the model's config lists {len(listed)} layer_types for num_hidden_layers {num_layers}; expected one per layer. "
            "Check config.json against the model's original."
        )
    return tuple(present_name(str(kind)) for kind in listed)


def _type_of(layer: Any) -> str:
    if getattr(layer, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(layer, "attention_chunk_size", None) is None else "chunked_attention"


def _refuse(config: PretrainedConfig, text: Any, facts: FamilyFacts) -> None:
    if reason := _unsupported_reason(config, text, facts):
        raise UnsupportedModelError(
            f"{text.model_type} models cannot be quantized: {reason}. Expected a decoder-only language model with "
            "attention keys and values, for example llama, mistral or qwen."
        )


def _unsupported_reason(config: PretrainedConfig, text: Any, facts: FamilyFacts) -> str:
    if facts.unsupported:
        return facts.unsupported
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if is_encoder(text):
        return "it is an encoder, which keeps no cache"
    if layer_values(text, "kv_lora_rank"):
        return LATENT_REASON
    if not layer_values(text, "num_attention_heads"):
        return "it has no attention keys and values (its config has no 'num_attention_heads')"
    if not is_language_model(config, text):
        return "it is not a causal language model"
    return _shape_reason(text) or _kinds_reason(text)


def _shape_reason(text: Any) -> str:
    sharing = getattr(text, "kv_sharing_modes", None)
    if sharing and all(mode == "reuse" for mode in sharing):
        return ASSISTANT_REASON
    value_dims = layer_values(text, "v_head_dim")
    key_dims = layer_values(text, "head_dim")
    if value_dims and key_dims and value_dims != key_dims:
        return f"its values have {value_dims[0]} channels per head and its keys {key_dims[0]}, which is not handled"
    return ""


def _kinds_reason(text: Any) -> str:
    kinds = Counter(layer_types(text))
    for kind, count in kinds.most_common():
        if unsupported := layer_kind(kind).unsupported:
            known = layer_config(text, layer_types(text).index(kind))
            words = unsupported.format(sliding_window=getattr(known, "sliding_window", None))
            return f"{count} of its {kinds.total()} layers are of the kind {kind}: {words}"
    return ""


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
    layer = layer_config(text, index)
    sizes = {key: getattr(layer, key, None) for key in ("sliding_window", "attention_chunk_size")}
    return layer_kind(kind).reason.format(**sizes)
