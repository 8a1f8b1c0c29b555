import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter. The variable counts when triton itself is first imported, by
# whichever test that is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))

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


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_config(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    def make(model_type: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
        from transformers import AutoModelForCausalLM

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
