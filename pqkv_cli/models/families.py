"""What a model's config does not say about its attention: one row per family.

Knows names of model types and facts about their code. Knows no tensors; reads no config.
A family without a row is handled by the attributes that all transformers configs share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Where the config says which layers leave rotary embedding out.
NopeRule = Literal["", "no_rope_layers", "full_attention", "full_attention_of_hybrid", "position_embedding_type"]
# How far compression goes: attention reads the codes; they are decoded for attention at every step; none at all.
Tier = Literal["codes", "decoded", "dense"]


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """Facts about one family.

    Attributes
    ----------
    interleaved
        Rotary pairs are channels (2p, 2p + 1).
    unrotatable
        Why keys cannot be coded before rotary embedding; empty where they can.
    nope
        How to tell the layers without rotary embedding.
    decoded
        Why attention cannot read codes, so that keys and values are decoded for it at every step (right, but slow); empty
        where it can.
    unsupported
        Why the family cannot be quantized at all; empty where it can.
    """

    interleaved: bool = False
    unrotatable: str = ""
    nope: NopeRule = ""
    decoded: str = ""
    unsupported: str = ""

    @property
    def tier(self) -> Tier:
        """How far compression goes."""
        if self.unsupported:
            return "dense"
        return "decoded" if self.decoded else "codes"


LATENT_REASON = (
    "its cache holds one latent vector per token (multi-head latent attention), already much smaller than keys and values, "
    "and coding it is not handled"
)
ASSISTANT_REASON = "it drafts for another model, whose cache it reads, and keeps none of its own"
_STANDARD = FamilyFacts()
_INTERLEAVED = FamilyFacts(interleaved=True)
_NO_ROPE_LIST = FamilyFacts(nope="no_rope_layers")
_HYBRID_NOPE = FamilyFacts(nope="full_attention_of_hybrid")
_FULL_NOPE = FamilyFacts(nope="full_attention")
# Their modules hand out (c0, c0, c1, c1, ...) where all others repeat the whole half.
_REPEATED = "its rotary module repeats each angle in place"
_NORMED_AFTER = "it normalizes keys after their rotation, with a factor per channel"
_BACKWARDS = "it rotates pairs the other way round"
_COMPLEX = "its rotary embedding is a complex tensor"
_STATE_SPACE = FamilyFacts(unsupported="it keeps a recurrent state instead of attention keys and values")
_LATENT = FamilyFacts(unsupported=LATENT_REASON)
_OWN_ATTENTION = FamilyFacts(unsupported="its attention does not go through the attention interface of transformers")

FAMILIES: Mapping[str, FamilyFacts] = {
    "llama": _STANDARD,
    "mistral": _STANDARD,
    "mixtral": _STANDARD,
    "qwen2": _STANDARD,
    "qwen2_moe": _STANDARD,
    "qwen3": _STANDARD,
    "qwen3_moe": _STANDARD,
    "gemma2": _STANDARD,
    "gemma3_text": _STANDARD,
    "gemma4_text": _STANDARD,
    "gemma4_unified_text": _STANDARD,
    "phi3": _STANDARD,
    "gpt_oss": _STANDARD,
    "olmo2": _STANDARD,
    "glm": _INTERLEAVED,
    "glm4": _INTERLEAVED,
    "helium": _INTERLEAVED,
    "ernie4_5": _INTERLEAVED,
    "ernie4_5_moe": _INTERLEAVED,
    "cohere": FamilyFacts(interleaved=True, unrotatable=_REPEATED),
    "cohere2": FamilyFacts(interleaved=True, unrotatable=_REPEATED, nope="full_attention"),
    "cohere2_moe": FamilyFacts(interleaved=True, unrotatable=_REPEATED, nope="full_attention"),
    "smollm3": _NO_ROPE_LIST,
    "exaone4": _HYBRID_NOPE,
    "exaone_moe": _HYBRID_NOPE,
    "hunyuan_v1_dense": FamilyFacts(unrotatable=_NORMED_AFTER),
    "hunyuan_v1_moe": FamilyFacts(unrotatable=_NORMED_AFTER),
    "nanochat": FamilyFacts(unrotatable=_BACKWARDS),
    "kolibri1": _HYBRID_NOPE,
    "afmoe": _FULL_NOPE,
    "flint": _FULL_NOPE,
    "lara_mini": _FULL_NOPE,
    "granitemoehybrid": FamilyFacts(nope="position_embedding_type"),
    "llama4_text": FamilyFacts(unrotatable=_COMPLEX, nope="no_rope_layers"),
    "doge": FamilyFacts(decoded="it computes its attention mask from all cached values"),
    "diffllama": FamilyFacts(unsupported="its layers attend twice with halves of the values, which is not handled"),
    "gemma3n_text": _STANDARD,
    "jetmoe": FamilyFacts(unsupported="its experts repeat key/value heads in an order of their own, which is not handled"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "rwkv": _STATE_SPACE,
    "xlstm": _STATE_SPACE,
    "falcon": _OWN_ATTENTION,
    "mpt": _OWN_ATTENTION,
    "bloom": _OWN_ATTENTION,
    "gemma4_assistant": FamilyFacts(unsupported=ASSISTANT_REASON),
    "gemma4_unified_assistant": FamilyFacts(unsupported=ASSISTANT_REASON),
    "gptj": _OWN_ATTENTION,
    "codegen": _OWN_ATTENTION,
}

# rope types whose frequencies do not depend on the length of the text, so a key can be un-rotated and stay valid.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


def family(model_type: str) -> FamilyFacts:
    """Return the facts of `model_type`, the standard ones for an unknown family."""
    return FAMILIES.get(model_type, _STANDARD)
