"""Any weight that keys or values may depend on is part of a model's identity."""

from typing import Any

import pytest
import torch

from pqkv_cli.models.identity import model_identity


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_every_weight_counts(tiny: Any, model_type: str) -> None:
    model = tiny(model_type)
    before = model_identity(model).weights_sha256
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name == "lm_head.weight":
            continue
        with torch.no_grad():
            kept = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] = kept + 1
            assert model_identity(model).weights_sha256 != before, name
            parameter.view(-1)[-1] = kept
    assert model_identity(model).weights_sha256 == before


def test_swapped_layers_are_another_model(tiny: Any) -> None:
    model = tiny("llama")
    before = model_identity(model).weights_sha256
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    model.model.layers[0].mlp, model.model.layers[1].mlp = second, first
    assert model_identity(model).weights_sha256 != before


def test_number_format_and_head_do_not_count(tiny: Any) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    before = model_identity(model).weights_sha256
    with torch.no_grad():
        model.lm_head.weight += 1
    assert model_identity(model).weights_sha256 == before
    assert model_identity(model.to(torch.bfloat16)).weights_sha256 == before
