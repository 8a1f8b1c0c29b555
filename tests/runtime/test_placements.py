"""Models that do not lie in one piece: the whole chain on weights offloaded to disk, and inside a pipeline."""

from pathlib import Path
from typing import Any

import torch
from tiny_chain import byte_tokenizer, fit_artifact, tiny_llama, tokens
from transformers import AutoModelForCausalLM, pipeline

from pqkv_cli.runtime import Artifact, attach, load

OPTIONS = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_calibrate_fit_and_generate_with_weights_on_disk(tmp_path: Path) -> None:
    plain = tiny_llama()
    plain.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | {"model.layers.1": "disk", "lm_head": "disk"}, offload_folder=tmp_path / "w"
    ).eval()
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta
    ids, found = tokens(1, 150), []
    for name, model in (("plain", plain), ("offloaded", offloaded)):
        with attach(model, load(fit_artifact(model, tmp_path / name))) as attached:
            cache = attached.new_cache()
            found.append(model.generate(ids, past_key_values=cache, **OPTIONS))
            assert cache.num_materialized == 0
    assert torch.equal(*found)
    files = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("plain", "offloaded")]
    assert files[0] == files[1], "the same artifact, byte for byte"


def test_accelerate_may_choose_the_places(tmp_path: Path, model: Any, artifact: Artifact) -> None:
    model.save_pretrained(tmp_path / "model")
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "w"
    ).eval()
    assert {"cpu", "disk"} <= set(map(str, spread.hf_device_map.values()))
    ids, found = tokens(1, 150), []
    for placed in (model, spread):
        with attach(placed, artifact) as attached:
            cache = attached.new_cache()
            found.append(placed.generate(ids, past_key_values=cache, **OPTIONS))
            assert cache.num_materialized == 0
    assert torch.equal(*found)


def test_a_pipeline_takes_the_cache(model: Any, artifact: Artifact) -> None:
    tokenizer = byte_tokenizer()
    prompt = "abcdefghij" * 15
    with attach(model, artifact) as attached:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        cache = attached.new_cache()
        made = pipe(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, return_full_text=True)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, past_key_values=attached.new_cache(), max_new_tokens=20, do_sample=False)
    assert made[0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert sum(layer.num_coded for layer in cache.quantized_layers) > 0 and cache.num_materialized == 0
