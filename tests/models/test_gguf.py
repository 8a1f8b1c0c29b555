"""Models in GGUF files: the same logits as the weights they were written from, found again, and refused in words."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_gguf import TEMPLATE, vocabulary, write_gguf
from transformers import AutoModelForCausalLM

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.models.converted import conversion, convert, converted
from pqkv_cli.models.gguf import content_key, is_gguf, read_header
from pqkv_cli.models.identity import model_identity
from pqkv_cli.models.load import load_config, load_model
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.fingerprints import model_fingerprint


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(place))
    return place


@pytest.fixture(scope="module")
def original(tiny: Any) -> Any:
    return tiny("llama", vocab_size=len(vocabulary()), num_hidden_layers=2)


@pytest.fixture
def file(original: Any, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny.F32.gguf", original)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 35)[None]).logits.float()
    return found


def test_the_model_is_the_one_that_was_written(file: Path, original: Any, capfd: pytest.CaptureFixture[str]) -> None:
    resolved = resolve_model(str(file))
    assert (resolved.label, resolved.is_local) == ("Tiny.F32", True)
    model, tokenizer = load_model(resolved)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(model), logits(original))
    assert model_identity(model).weights_sha256 == model_identity(original).weights_sha256
    own = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert model_identity(model) == model_identity(own)  # so that an artifact serves who loads the file without us
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("<s>a  ")["input_ids"] == [1, vocabulary().index("a"), vocabulary().index("ĠĠ")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<s>a</s>"
    assert tokenizer.chat_template == TEMPLATE and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_it_is_converted_once(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    place = converted(file, notes.append)
    assert place.parent == home / "pqkv" / "gguf" and place.name.startswith("Tiny.F32-")
    assert notes == [f"converting Tiny.F32.gguf into safetensors, once: it lies in {place} from then on"]
    monkeypatch.setattr("pqkv_cli.hf.gguf_files.read_config", lambda path: pytest.fail("read again"))
    assert converted(file, notes.append) == place and len(notes) == 1
    load_model(resolve_model(str(file)))
    moved = file.with_name("other.gguf")
    shutil.copy(file, moved)
    assert content_key(moved) == content_key(file)
    assert [path.name for path in place.parent.iterdir() if path.name != ".lock"] == [place.name]


def test_the_config_is_read_without_a_conversion(file: Path, home: Path) -> None:
    resolved = resolve_model(str(file))
    config = load_config(resolved)
    assert (config.num_hidden_layers, config.dtype) == (2, torch.float32)
    assert not home.exists()
    converted(file)
    assert load_config(resolved).to_dict().keys() >= {"num_hidden_layers", "rope_parameters"}


@pytest.mark.parametrize("kind, stored", [("Q8_0", "float32"), ("Q4_1", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_weights_are_what_the_file_says(kind: str, stored: str, original: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", original, kind)
    model, _ = load_model(resolve_model(str(file)), torch.float32)
    assert json.loads((conversion(file) / "config.json").read_text())["dtype"] == stored
    reader = gguf.GGUFReader(file)
    written = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(written.data, written.tensor_type).copy())
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected.reshape(64, 96))
    assert load_model(resolve_model(str(file)))[0].dtype == getattr(torch, stored)


def test_what_lies_beside_the_file_is_not_read(file: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (file.parent / name).write_text('{"model_type": "bert", "tokenizer_class": "Foreign", "max_length": 7}')
    model, _ = load_model(resolve_model(str(file)))
    assert model.config.model_type == "llama" and model.generation_config.max_length != 7


def test_the_fingerprint_is_of_the_content(file: Path, original: Any, tmp_path: Path) -> None:
    before = model_fingerprint(str(file))
    assert model_fingerprint(str(write_gguf(tmp_path / "same.gguf", original))) == before
    template = write_gguf(tmp_path / "template.gguf", original, tokenizer__chat_template=TEMPLATE.replace("<s>", "<x>"))
    assert model_fingerprint(str(template)) != before
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1  # of the last tensor
    file.write_bytes(raw)
    assert model_fingerprint(str(file)) != before


@pytest.mark.parametrize("rule, ids", [("gpt-2", "[' ', ' 1']"), ("smollm", "['  ', '1']")])
def test_text_is_cut_as_the_file_says(rule: str, ids: str, original: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    file = write_gguf(tmp_path / "m.gguf", original, tokenizer__ggml__pre=rule)
    converted(file, notes.append)
    _, tokenizer = load_model(resolve_model(str(file)))
    pieces = [piece.replace("Ġ", " ") for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  1")]
    assert str(pieces) == ids and len(notes) == 1


def test_a_rule_that_nobody_knows_is_said(original: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    converted(write_gguf(tmp_path / "m.gguf", original, tokenizer__ggml__pre="viking"), notes.append)
    assert "cuts text by the rule 'viking'" in notes[1] and "cuts like GPT-2" in notes[1]


def llama3_factors(factor: float, theta: float = 10000.0, dim: int = 16) -> list[float]:
    """As llama.cpp's converter counts them."""
    found = []
    for channel in range(0, dim, 2):
        wave = 2 * torch.pi * theta ** (channel / dim)
        share = min(1.0, max(0.0, (8192 / wave - 1) / (4 - 1)))
        found.append(1 / ((1 - share) / factor + share))
    return found


def test_scaled_rotary_embedding(tiny: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    scaled = tiny("llama", vocab_size=len(vocabulary()), num_hidden_layers=1, rope_parameters=rope)
    file = write_gguf(tmp_path / "m.gguf", scaled, rope_freqs=llama3_factors(32.0))
    model, _ = load_model(resolve_model(str(file)))
    assert model.config.rope_parameters == rope
    assert torch.equal(logits(model), logits(scaled))
    declared = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
    yarn = write_gguf(tmp_path / "y.gguf", scaled, **declared, llama__rope__scaling__original_context_length=64)
    found = load_config(resolve_model(str(yarn))).rope_parameters
    assert (found["rope_type"], found["factor"], found["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    linear = write_gguf(tmp_path / "l.gguf", scaled, llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    assert load_config(resolve_model(str(linear))).rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize(
    "facts", [{"rope_freqs": [1.0, 1, 1, 1, 2, 3, 4, 5]}, {"llama__rope__scaling__type": "longrope"}], ids=["factors", "kind"]
)
def test_rotary_embedding_that_cannot_be_told_is_refused(facts: Any, original: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", original, **facts)
    with pytest.raises(UnsupportedModelError, match=r"scales its rotary embedding.*expected none, linear.*Use the model's own"):
        load_config(resolve_model(str(file)))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a GGUF file: it is empty"),
        (b"PK\x03\x04 an archive", r"is not a GGUF file: it begins with b'PK.*expected b'GGUF'"),
        (b"GGUF\3\0\0\0", "is cut short: it ends after 8 bytes, within its head"),
        (b"GGUF\1\0\0\0" + bytes(16), "is GGUF of version 1; expected version 2 or 3.*newer llama.cpp"),
        (b"GGUF\3\0\0\0" + bytes(16), "is damaged: it names no general.architecture"),
    ],
    ids=["empty", "zip", "head", "version", "nothing"],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_file_cut_short_is_refused(file: Path) -> None:
    raw = file.read_bytes()
    for length in (30, 700, read_header(file).num_bytes - 10, len(raw) // 2, len(raw) - 40):
        file.write_bytes(raw[:length])
        with pytest.raises(ModelError, match=r"is cut short.*Copy or download it again"):
            resolve_model(str(file))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"split__count": 3}, r"is one of 3 parts.*llama-gguf-split --merge"),
        ({"general__type": "adapter"}, r"holds no model but a part of one \(adapter\)"),
        ({"tokenizer__ggml__model": None}, r"has no tokenizer \(tokenizer.ggml.model\)"),
    ],
    ids=["parts", "adapter", "tokenizer"],
)
def test_parts_of_models_are_refused(facts: Any, message: str, original: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(str(write_gguf(tmp_path / "m.gguf", original, **facts)))


def test_kinds_that_the_library_does_not_read_are_refused(original: Any, tmp_path: Path, home: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", original, architecture="rwkv7")
    for load in (load_config, load_model):
        with pytest.raises(
            UnsupportedModelError, match=r"architecture 'rwkv7', which transformers .* expected one of .*llama.*Use"
        ):
            load(resolve_model(str(file)))
    assert not home.exists() or not list(home.rglob("config.json"))


def test_a_missing_tensor_and_a_bad_tokenizer_are_refused(original: Any, tmp_path: Path, home: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", original, llama__block_count=3)
    with pytest.raises(ModelError, match=r"lacks 9 tensors of llama \(model.layers.2.*expected all"):
        load_model(resolve_model(str(file)))
    other = write_gguf(tmp_path / "n.gguf", original, tokenizer__ggml__tokens=None)
    with pytest.raises(ModelError, match=r"n.gguf cannot be read: .*Expected a language model with its tokenizer"):
        load_model(resolve_model(str(other)))
    assert not list(home.rglob("config.json"))


def test_the_package_is_named_where_it_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ModelError, match=r"package gguf, which is not installed; run: pip install 'pqkv\[gguf\]'"):
        resolve_model(str(file))


def test_a_directory_with_a_file_says_to_name_it(file: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json.*1 GGUF file: name the file itself, such as .*Tiny.F32.gguf"):
        resolve_model(str(file.parent))


def test_a_file_is_known_by_its_first_bytes_too(file: Path) -> None:
    blob = file.rename(file.with_name("sha256-0123"))
    assert is_gguf(blob) and not is_gguf(file.parent) and not is_gguf(file)
    assert resolve_model(str(blob)).label == "sha256-0123"


def test_no_room_and_a_place_that_is_taken(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"exists; expected a place for the conversion"):
        convert(file, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"needs [\d,]+ bytes and 1,000 are free.*HF_HOME"):
        converted(file)
