"""Tiny random models of every family we speak of, built from configs."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = dict(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
_MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_MIXED = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=40)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=256)

_LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)

# Family: what its config needs beyond the sizes. The name is the model type where the row gives none.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=2),
    "llama2": dict(model_type="llama", num_hidden_layers=2, num_key_value_heads=4),
    "llama3": dict(model_type="llama", num_hidden_layers=2, rope_parameters=_LLAMA_3),
    "mistral": dict(num_hidden_layers=2, sliding_window=None),
    "mixtral": dict(num_hidden_layers=2, sliding_window=None, **_MOE),
    "qwen2": dict(num_hidden_layers=2),
    "qwen3": dict(num_hidden_layers=2),
    "qwen3_moe": dict(num_hidden_layers=2, **_MOE),
    "gemma2": dict(sliding_window=40, attn_logit_softcapping=2.0),
    "gemma3_text": _MIXED,
    "gemma3n_text": dict(
        _MIXED,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=258,
        intermediate_size=[32] * 4,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": dict(
        _MIXED, num_kv_shared_layers=2, global_head_dim=32, hidden_size_per_layer_input=8, vocab_size_per_layer_input=258
    ),
    "phi3": dict(num_hidden_layers=2, partial_rotary_factor=0.5),
    "gpt_oss": dict(_MIXED, rope_parameters=_YARN, **_MOE),
    "olmo2": dict(num_hidden_layers=2),
    "cohere2": _MIXED,
    "smollm3": dict(num_hidden_layers=2, no_rope_layers=[1, 0]),
    "glm4": dict(num_hidden_layers=2),
    "llama4_text": dict(
        intermediate_size_mlp=32, attention_chunk_size=40, no_rope_layers=[1, 0, 1, 0], interleave_moe_layer_step=2, **_MOE
    ),
    "exaone4": _MIXED,
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        partial_rotary_factor=0.5,
        shared_expert_intermediate_size=16,
        **_MOE,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "doge": dict(num_hidden_layers=2, keep_window_size=2048),
}


def family_config(name: str, **changes: Any) -> Any:
    return AutoConfig.for_model(**{"model_type": name, **_SIZES, **FAMILIES[name], **changes})


def family_model(name: str, **changes: Any) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                parameter *= 5  # sharper attention than at initialization, so that a wrong key changes the tokens
            if key.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model
