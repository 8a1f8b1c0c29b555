"""Multi-head latent attention (DeepSeek V2, V3): what transformers caches, and that we leave it alone, saying why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.models.families import family
from pqkv_cli.models.geometry import geometry

HEADS, RANK, ROPE, NOPE, VALUE = 4, 32, 16, 24, 20


def latent_model(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=RANK,
        q_lora_rank=24,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_cache_of_deepseek_v3_is_latent_already() -> None:
    model, tokens = latent_model("deepseek_v3"), torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) // (2 * 40)
    expanded = HEADS * (NOPE + ROPE) + HEADS * VALUE
    assert held == RANK + ROPE < expanded


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_it_is_refused_before_any_work_with_the_reason(model_type: str, tmp_path: Path) -> None:
    model = latent_model(model_type)
    assert family(model_type).tier == "dense"
    windows, settings = torch.zeros(4, 8, dtype=torch.int64), CollectSettings("0" * 64, num_samples=4, seq_len=8)
    for attempt in (
        lambda: geometry(model.config),
        lambda: collect(model, windows, tmp_path / "calibration", settings, lambda done, total: None),
    ):
        with pytest.raises(UnsupportedModelError, match="latent vector per token .* already much smaller"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_a_row_is_known_by_its_config() -> None:
    config = latent_model("deepseek_v3").config
    config.model_type = "some_latent_model"
    with pytest.raises(UnsupportedModelError, match="some_latent_model models cannot be quantized: .*latent"):
        geometry(config)
