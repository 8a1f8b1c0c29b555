import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.identity import model_identity
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import ResolvedModel, resolve_model


@pytest.fixture
def directory(tiny: Any, tmp_path: Path) -> Path:
    path = tmp_path / "a-model"
    tiny("llama").save_pretrained(path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def test_local_directory(directory: Path) -> None:
    assert resolve_model(str(directory)) == ResolvedModel(str(directory), True, "a-model")


def test_hub_id() -> None:
    assert resolve_model("some-org/Some.model-1B") == ResolvedModel("some-org/Some.model-1B", False, "some-org/Some.model-1B")


@pytest.mark.parametrize("reference", ["", "nowhere", "./nowhere", "/no/where/at/all", "a/b/c"])
def test_what_is_nowhere_is_refused(reference: str) -> None:
    with pytest.raises(ModelError, match=r"is not there.*org/name"):
        resolve_model(reference)


def test_incomplete_directories(directory: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="is empty"):
        resolve_model(str(empty))
    (empty / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(empty))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        resolve_model(str(directory))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(directory / "config.json"))


def test_load(directory: Path) -> None:
    model, tokenizer = load_model(resolve_model(str(directory)), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.bos_token_id == 1


def test_loading_prints_nothing(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(resolve_model(str(directory)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["truncated", "no_tokenizer", "bad_json", "unknown_type", "missing_tensor"])
def test_damaged_models(directory: Path, damage: str, tiny: Any) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no_tokenizer":
        for path in directory.glob("tokenizer*"):
            path.unlink()
    elif damage == "bad_json":
        config.write_text("{")
    elif damage == "unknown_type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "nonesuch"}))
    else:
        tiny("llama", num_hidden_layers=2).save_pretrained(directory)
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="a-model"):
        load_model(resolve_model(str(directory)))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(directory: Path, tmp_path: Path) -> None:
    for file in directory.glob("*.safetensors"):
        file.unlink()
    harm = tmp_path / "harm"
    command = f"touch {harm}".encode()
    code = b"\x80\x02cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."
    (directory / "pytorch_model.bin").write_bytes(code)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(resolve_model(str(directory)))
    assert not harm.exists()


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UnsupportedModelError, match="encoder"):
        load_model(resolve_model(str(tmp_path / "bert")))


def test_a_hub_id_without_network_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_model(resolve_model("no-such-org/no-such-model"))
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert "no-such-org/no-such-model" in message
    assert huggingface_hub.constants.HF_HUB_CACHE in message
    assert "Name or service not known" in message and "directory" in message


def test_offline_mode_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_model(resolve_model("no-such-org/no-such-model"))


def test_identity(directory: Path, tmp_path: Path) -> None:
    wide, _ = load_model(resolve_model(str(directory)), torch.float32)
    narrow, _ = load_model(resolve_model(str(directory)), torch.bfloat16)
    moved = shutil.copytree(directory, tmp_path / "elsewhere")
    assert model_identity(wide) == model_identity(narrow) == model_identity(load_model(resolve_model(str(moved)))[0])
    with torch.no_grad():
        wide.model.layers[2].self_attn.o_proj.weight[0, 0] += 1
    assert model_identity(wide).config_sha256 == model_identity(narrow).config_sha256
    assert model_identity(wide).weights_sha256 != model_identity(narrow).weights_sha256


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "gpt_neox"])
def test_identity_of_fused_projections(tiny: Any, model_type: str) -> None:
    model = tiny(model_type)
    before = model_identity(model)
    parameter = next(p for n, p in model.named_parameters() if any(x in n for x in ("qkv", "c_attn", "query_key_value")))
    with torch.no_grad():
        parameter.view(-1)[0] += 1
    assert model_identity(model).weights_sha256 != before.weights_sha256


def test_another_architecture_is_another_model(tiny: Any) -> None:
    assert model_identity(tiny("llama")).config_sha256 != model_identity(tiny("llama", num_key_value_heads=4)).config_sha256


def test_stories(stories: Path) -> None:
    model, tokenizer = load_model(resolve_model(os.fspath(stories)))
    assert model.config.num_hidden_layers == 5
    assert tokenizer("Once upon a time")["input_ids"][0] == tokenizer.bos_token_id
