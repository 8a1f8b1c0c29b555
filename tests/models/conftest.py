from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"


def make_config(model_type: str, **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    def make(model_type: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
        torch.manual_seed(0)
        config = make_config(model_type, **changes)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def config_of() -> Callable[..., Any]:
    return make_config


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip(f"no second real model at {STORIES}")
    return STORIES
