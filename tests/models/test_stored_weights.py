"""Weights that are not plain parameters: packed into buffers, offloaded, or quantized tensors that pose as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pqkv_cli.hf.modules import attention_modules, output_weight, stored_tensors
from pqkv_cli.models.identity import model_identity


class PackedLinear(nn.Module):
    """Eight-bit weights in buffers, as GPTQ and AWQ layers keep theirs."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (plain.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.register_buffer("scratch", torch.randn(3, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scales).T


def packed(model: Any) -> Any:
    for attention in attention_modules(model).values():
        for name, child in list(attention.named_children()):
            if isinstance(child, nn.Linear):
                setattr(attention, name, PackedLinear(child))
    return model


def test_packed_models_are_told_apart(tiny: Callable[..., Any]) -> None:
    plain, one, same, other = tiny(), packed(tiny()), packed(tiny()), packed(tiny())
    attention_modules(other)[1].o_proj.qweight[0, 0] += 1
    hashes = [model_identity(model).weights_sha256 for model in (plain, one, same, other)]
    assert hashes[1] == hashes[2], "what is not saved must not count"
    assert len(set(hashes)) == 3


def test_the_output_weight_is_read_through_a_packed_module(tiny: Callable[..., Any]) -> None:
    expected = output_weight(attention_modules(tiny())[0], 4, 16)
    found = output_weight(attention_modules(packed(tiny()))[0], 4, 16)
    assert (found - expected).abs().max() <= expected.abs().max() / 127


def test_offloaded_weights_are_the_same_weights(tiny: Callable[..., Any], tmp_path: Path) -> None:
    plain = tiny()
    plain.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")}
    places |= {"model.rotary_emb": "cpu", "model.layers.2": "disk", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    attention = attention_modules(offloaded)[2]
    assert attention.q_proj.weight.is_meta
    assert model_identity(offloaded) == model_identity(plain)
    assert attention.q_proj.weight.is_meta, "looking must not load for good"
    torch.testing.assert_close(output_weight(attention, 4, 16), output_weight(attention_modules(plain)[2], 4, 16))


def test_names_are_in_order(tiny: Callable[..., Any]) -> None:
    names = [name for name, _ in stored_tensors(attention_modules(tiny())[0])]
    assert names == sorted(names) == ["k_proj.weight", "o_proj.weight", "q_proj.weight", "v_proj.weight"]


def test_torchao_weights(tiny: Callable[..., Any]) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, model = tiny(), tiny()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model_identity(model).weights_sha256 != model_identity(plain).weights_sha256
    expected = output_weight(attention_modules(plain)[0], 4, 16)
    found = output_weight(attention_modules(model)[0], 4, 16)
    assert (found - expected).abs().max() <= expected.abs().max() / 64
