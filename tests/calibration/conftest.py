from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pqkv_cli.calibration.collect import CollectSettings

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    def make(model_type: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def settings() -> CollectSettings:
    return CollectSettings("0" * 64, num_samples=8, seq_len=24, batch_size=2, reservoir_size=60, queries_per_window=5)


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip(f"no second real model at {STORIES}")
    return STORIES
