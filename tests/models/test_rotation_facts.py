"""Which layers rotate their keys, as the model itself does it: keys of the same text at other positions are compared.

Attention is relative, so the inputs of every layer stay the same when all positions are shifted; only rotation moves keys.
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles
from pqkv_kernels.format.rotary import unrotate

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=32)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GRANITE_H = dict(
    layer_types=["mamba", "attention"] * 2,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_expand=2,
    shared_intermediate_size=16,
    **MOE,
)
LINEAR = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
OLMO_HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2, **LINEAR)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
# Family and what its config says beyond the sizes, and which of its quantizable layers rotate.
CASES: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "llama": ({}, [True] * 4),
    "nanochat": ({}, [True] * 4),
    "smollm3": (dict(no_rope_layers=[1, 0, 1, 0]), [True, False, True, False]),
    "exaone4": (MIXED, [False] * 2),
    "exaone4 without windows": (dict(sliding_window=None, layer_types=["full_attention"] * 4), [True] * 4),
    "kolibri1": (dict(MIXED, **MOE), [False] * 2),
    "afmoe": (dict(MIXED, **MOE), [False] * 2),
    "flint": (dict(MIXED, **MOE), [False] * 2),
    "cohere2": (MIXED, [False] * 2),
    "olmo3": (MIXED, [True] * 2),
    "granite_swa": (MIXED, [True] * 2),
    "granite_swa with bases": (dict(MIXED, layer_rope_theta=[1e4, 5e5, 1e4, 0]), [True, False]),
    "granitemoe_swa with bases": (dict(MIXED, layer_rope_theta=[0, 5e5, 1e4, 1e4], **MOE), [True, True]),
    "granitemoehybrid nope": (dict(GRANITE_H, position_embedding_type="nope"), [False] * 2),
    "granitemoehybrid rope": (dict(GRANITE_H, position_embedding_type="rope"), [True] * 2),
    "granitemoehybrid": (GRANITE_H, [False] * 2),
    "olmo_hybrid": (dict(OLMO_HYBRID, rope_parameters=PLAIN), [True] * 2),
    "olmo_hybrid nope": (dict(OLMO_HYBRID, rope_parameters=dict(rope_type="default", rope_theta=None)), [False] * 2),
}


def case_model(case: str) -> Any:
    name, changes = case.split()[0], CASES[case][0]
    try:
        config = AutoConfig.for_model(name, **{**SIZES, **changes})
    except ValueError:
        pytest.skip(f"the installed transformers has no family {name}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


class Keys:
    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.found[layer_index] = step.keys.clone()


def keys_at(model: Any, positions: torch.Tensor) -> dict[int, torch.Tensor]:
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    keys = Keys()
    with torch.no_grad(), tap(model, keys):
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return keys.found


@pytest.mark.parametrize("case", list(CASES))
def test_the_geometry_says_what_the_model_does(case: str) -> None:
    model = case_model(case)
    near, far = torch.arange(12)[None], torch.arange(12)[None] + 37
    shape = geometry(model.config)
    at_near, at_far = keys_at(model, near), keys_at(model, far)
    layers = [index for index, layer in enumerate(shape.layers) if not layer.dense_reason]
    assert len(layers) == len(CASES[case][1])
    for index, rotates in zip(layers, CASES[case][1], strict=True):
        moved = not torch.allclose(at_near[index], at_far[index], atol=1e-4)
        assert moved is rotates, f"the table of this test is wrong about layer {index}"
        layout = shape.layers[index].rotary
        if layout is None:
            post = "coded after rotary embedding" in shape.notes[index]
            assert post is rotates, shape.notes[index]
            continue
        assert rotates, f"layer {index} would be un-rotated and does not rotate"
        angles = rotary_angles(model, index)
        plain = [unrotate(keys, *angles(at), layout) for keys, at in ((at_near[index], near), (at_far[index], far))]
        torch.testing.assert_close(plain[0], plain[1], atol=2e-4, rtol=0)
