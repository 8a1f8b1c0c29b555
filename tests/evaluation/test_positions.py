"""How many positions a model has is known in one place, also where its text part is one of several."""

from types import SimpleNamespace

import pytest
from transformers import Gemma3Config, LlamaConfig, PretrainedConfig

from pqkv_cli.evaluation.prompts import num_positions
from pqkv_cli.models.geometry import geometry

_TEXT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4321
)


@pytest.mark.parametrize("config", [LlamaConfig(**_TEXT), Gemma3Config(text_config=_TEXT)], ids=["plain", "composite"])
def test_evaluation_knows_what_the_geometry_knows(config: PretrainedConfig) -> None:
    assert num_positions(SimpleNamespace(config=config)) == geometry(config).max_positions == 4321
