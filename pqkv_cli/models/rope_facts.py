"""From a config to how a layer's keys are rotated, and why they may have to be coded as they are. Knows configs only."""

from dataclasses import dataclass
from typing import Any

from pqkv_cli.models.config_reader import layer_config, read
from pqkv_cli.models.families import FIXED_ROPE_TYPES, FamilyFacts
from pqkv_kernels.layout import RotaryLayout


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
