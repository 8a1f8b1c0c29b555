"""Models that are refused before any work, in words that say what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.load import load_config, load_model
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.models.structure import check_structure

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def directory(tiny: Any, tmp_path: Path) -> Path:
    from tiny_chain import byte_tokenizer

    tiny("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("transformers asked"))
    return tmp_path / "RAN"


OWN_CODE = [
    ("config.json", dict(model_type="mine", auto_map={"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.My"})),
    ("tokenizer_config.json", dict(tokenizer_class="MyTok", auto_map={"AutoTokenizer": [None, "code.MyTok"]})),
    ("tokenizer_config.json", dict(tokenizer_class=None, auto_map={"AutoTokenizer": "code.MyTok"})),
    ("tokenizer_config.json", dict(tokenizer_class=None, auto_map=["code.MyTok", None])),
    ("config.json", dict(auto_map={"AutoTokenizer": ["code.MyTok", None]})),
    ("config.json", dict(tokenizer_class="MyTok", auto_map={"AutoTokenizer": ["code.MyTok", None]})),
]


@pytest.mark.parametrize(("file", "changes"), OWN_CODE)
def test_code_of_repositories_is_never_run(directory: Path, ran: Path, file: str, changes: Any) -> None:
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    if file == "config.json":
        change(directory / "tokenizer_config.json", tokenizer_class=None)
    change(directory / file, **changes)
    with pytest.raises(ModelError, match="needs code of its own, which pqkv never runs"):
        load_model(resolve_model(str(directory)))
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "someone/fast@main:forward", "paged|someone/fast"])
def test_an_attention_of_the_hub_is_left_out_and_that_is_said(
    directory: Path, key: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package that fetches it, it would be fetched and run."""
    change(directory / "config.json", **{key: name})
    with pytest.warns(UserWarning, match="asks for the attention .* of the hub, whose code pqkv never runs"):
        model, _ = load_model(resolve_model(str(directory)))
    assert model.config._attn_implementation == "sdpa"


def test_a_known_architecture_is_loaded_with_the_code_of_transformers(directory: Path, ran: Path) -> None:
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change(directory / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    model, _ = load_model(resolve_model(str(directory)))
    assert type(model).__name__ == "LlamaForCausalLM" and not ran.exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("content", "words"), [(POINTER, "pointer of git-lfs"), (b"", "is empty")])
def test_pointers_and_empty_files(directory: Path, file: str, content: bytes, words: str) -> None:
    (directory / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"{file}.*{words}"):
        load_model(resolve_model(str(directory)))


@pytest.mark.parametrize("keep", [4, 20, -100])
def test_weights_that_are_cut_off(directory: Path, keep: int) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cut off"):
        load_model(resolve_model(str(directory)))


def test_files_that_an_index_names(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 are not there \(model-2.safetensors\)"):
        load_model(resolve_model(str(directory)))


def test_adapters(directory: Path, tmp_path: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config.json.*beside a model.*merge_and_unload"):
        resolve_model(str(directory))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"only an adapter.*merge_and_unload"):
        resolve_model(str(alone))


SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=64), "does not call its base model"),
        (AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global"], 2]]), "no attention module"),
        (AutoConfig.for_model("xglm", d_model=64, num_layers=2, attention_heads=4), "attention interface"),
        (AutoConfig.for_model("llava"), "AutoModelForCausalLM does not load them"),
        (AutoConfig.for_model("qwen2_5_vl"), "AutoModelForCausalLM does not load them"),
        (AutoConfig.for_model("gpt_neox", **SMALL, head_dim=8), r"layer 0 attends with .* \(4, 4, 16, 16\); expected"),
        (AutoConfig.for_model("minimax", **SMALL, num_key_value_heads=2), "MiniMaxLightningAttention does not use"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architectures(config: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_structure(config)


def test_good_architectures_pass(config_of: Any) -> None:
    for model_type in ("llama", "gpt2", "phi3", "gemma2"):
        check_structure(config_of(model_type))


def test_opt_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=64)
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_config(resolve_model(str(tmp_path)))
    with pytest.raises(UnsupportedModelError, match="does not call its base model"):
        load_model(resolve_model(str(tmp_path)))
