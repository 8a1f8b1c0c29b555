from typing import Any

import pytest
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.families import FAMILIES
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_kernels.format.layout import RotaryLayout


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "olmo2", "smollm3", "never_heard_of"])
def test_full_attention_families(config_of: Any, model_type: str) -> None:
    known = model_type if model_type != "never_heard_of" else "granite"
    shape = geometry(config_of(known))
    assert shape.model_type == known
    assert shape.max_positions == 256
    assert len(shape.layers) == 3
    for layer in shape.layers:
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.dense_reason) == (4, 2, 16, "")
        assert layer.rotary == RotaryLayout(16)
    check_quantizable(shape)


def test_head_dim_is_derived_where_the_config_has_none(config_of: Any) -> None:
    assert geometry(config_of("qwen2", head_dim=None)).layers[0].head_dim == 16


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("glm4", {"partial_rotary_factor": 0.5}, RotaryLayout(8, True)),
        ("gpt_neox", {"head_dim": None}, RotaryLayout(4)),
        ("stablelm", {}, RotaryLayout(4)),
        ("helium", {}, RotaryLayout(16, True)),
        ("gpt2", {}, None),
        ("cohere", {}, None),
    ],
)
def test_rotary_layout(config_of: Any, model_type: str, changes: dict[str, Any], expected: RotaryLayout | None) -> None:
    assert geometry(config_of(model_type, **changes)).layers[0].rotary == expected


@pytest.mark.parametrize(
    ("rope", "rotated"),
    [
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            },
            False,
        ),
    ],
    ids=["linear", "yarn", "dynamic", "longrope"],
)
def test_only_fixed_frequencies_are_unrotated(config_of: Any, rope: dict[str, Any], rotated: bool) -> None:
    shape = geometry(config_of("llama", rope_parameters={"rope_theta": 10000.0, **rope}))
    assert (shape.layers[0].rotary is not None) is rotated


def test_nope_layers(config_of: Any) -> None:
    shape = geometry(config_of("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]))
    assert [layer.rotary is None for layer in shape.layers] == [False, True, False, True]


def test_rope_parameters_per_layer_type(config_of: Any) -> None:
    shape = geometry(config_of("gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"]))
    assert shape.layers[1].rotary == RotaryLayout(16)
    assert [bool(layer.dense_reason) for layer in shape.layers] == [True, False, True]
    assert "sliding window of 4096" in shape.layers[0].dense_reason


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"])
def test_quantizable_layers_are_those_with_a_growing_cache(config_of: Any, model_type: str) -> None:
    config = config_of(model_type)
    growing = [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]
    assert [not layer.dense_reason for layer in geometry(config).layers] == growing


def test_sliding_windows_everywhere_leave_nothing(config_of: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"3 x sliding window of 32 tokens"):
        check_quantizable(geometry(config_of("mistral", sliding_window=32)))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "encoder"),
        ("t5", "encoder-decoder"),
        ("mamba", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("vit", "not a causal language model"),
        ("deepseek_v3", "latent"),
        ("mpt", "attention interface"),
        ("diffllama", "attend twice"),
        ("jetmoe", "an order of their own"),
    ],
)
def test_refusals_say_why(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        geometry(AutoConfig.for_model(model_type))


def test_missing_key_is_named(config_of: Any) -> None:
    config = config_of("llama")
    config.__dict__["num_hidden_layers"] = None
    with pytest.raises(ModelError, match="'num_hidden_layers'"):
        geometry(config)


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", "four"), ("num_key_value_heads", 0), ("head_dim", True)])
def test_wrong_values_are_named(config_of: Any, key: str, value: Any) -> None:
    config = config_of("llama")
    config.__dict__[key] = value
    with pytest.raises(ModelError, match=key):
        geometry(config)


def test_heads_must_divide(config_of: Any) -> None:
    config = config_of("llama")
    config.__dict__["num_key_value_heads"] = 3
    with pytest.raises(ModelError, match="4 query heads and 3"):
        geometry(config)


def test_layer_types_must_be_one_per_layer(config_of: Any) -> None:
    config = config_of("qwen2")
    config.__dict__["layer_types"] = ["full_attention"]
    with pytest.raises(ModelError, match="1 layer_types for num_hidden_layers 3"):
        geometry(config)


def test_layers_that_read_another_layers_cache_and_differ_in_size(config_of: Any) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = geometry(
        config_of("gemma4_text", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2, global_head_dim=32)
    )
    assert [layer.head_dim for layer in shape.layers] == [16, 32, 16, 32]
    assert [bool(layer.dense_reason) for layer in shape.layers] == [True, False, True, True]
    assert shape.layers[2].dense_reason == "it keeps no cache and reads that of layer 0"
    assert shape.layers[1].rotary == RotaryLayout(32)


def test_notes_say_why_keys_are_coded_as_they_are(config_of: Any) -> None:
    shape = geometry(config_of("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0]))
    assert shape.notes == ("", "its keys have no rotary embedding")
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    assert "frequencies of dynamic embedding change" in geometry(config_of("llama", rope_parameters=rope)).notes[0]
    assert "repeats each angle" in geometry(config_of("cohere")).notes[0]


def test_every_family_has_one_tier() -> None:
    tiers = {name: facts.tier for name, facts in FAMILIES.items()}
    assert tiers["llama"] == tiers["gpt_oss"] == tiers["gemma4_text"] == "codes"
    assert tiers["doge"] == "decoded"
    assert tiers["deepseek_v3"] == tiers["mamba"] == "dense"
