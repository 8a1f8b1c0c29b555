"""Checkpoints with quantized weights, saved and loaded through transformers, all the way to a compressed cache. On a CPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import fit_artifact, tiny_llama, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from pqkv_cli.errors import ArtifactError
from pqkv_cli.hf.modules import attention_modules, output_weight
from pqkv_cli.models.identity import model_identity
from pqkv_cli.runtime import attach, load

SIZES = dict(hidden_size=64, intermediate_size=64)


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_4bit() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def bitsandbytes_8bit() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("config", [torchao_int8, bitsandbytes_4bit, bitsandbytes_8bit])
def test_a_checkpoint_goes_the_whole_way(config: Callable[[], Any], tmp_path: Path) -> None:
    wanted, plain = config(), tiny_llama(**SIZES)
    plain.save_pretrained(tmp_path / "plain")
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=wanted, dtype=torch.float32, device_map="cpu"
    )
    made.save_pretrained(tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto", device_map="cpu").eval()

    assert model_identity(model).weights_sha256 == model_identity(made).weights_sha256
    assert model_identity(model).weights_sha256 != model_identity(plain).weights_sha256
    expected, found = (output_weight(attention_modules(m)[0], 4, 16).float() for m in (plain, model))
    assert float((found - expected).abs().max()) < 0.2 * float(expected.abs().max())

    artifact = load(fit_artifact(model, tmp_path))
    ids = tokens(1, 150, seed=4)
    dense = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        answer = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1, past_key_values=cache)
    assert answer.shape == dense.shape
    assert cache.num_bytes().codes > 0 and cache.num_materialized == 0


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(**SIZES)
    artifact = load(fit_artifact(model, tmp_path))
    other = copy.deepcopy(model)
    with torch.no_grad():  # what quantizing weights does, seen from here
        attention_modules(other)[1].v_proj.weight.mul_(1.01)
    with pytest.raises(ArtifactError, match="weights"):
        attach(other, artifact)
