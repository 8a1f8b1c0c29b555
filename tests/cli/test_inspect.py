"""What `inspect` says of each layer, and that a model with nothing to quantize is refused before its weights are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from family_models import family_config


def described(directory: Path, name: str, **changes: object) -> Path:
    """A model directory of which only the config can be read."""
    family_config(name, **changes).save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"not read")
    return directory


@pytest.mark.parametrize(
    ("name", "reasons", "notes"),
    [
        ("gemma3_text", ["sliding window of 40 tokens", ""] * 2, ["", ""]),
        ("gpt_oss", ["sliding window of 40 tokens", ""] * 2, ["", ""]),
        ("llama4_text", ["attention in chunks of 40 tokens", ""] * 2, ["its keys have no rotary embedding"] * 2),
        ("smollm3", ["", ""], ["", "its keys have no rotary embedding"]),
    ],
)
def test_it_says_per_layer_what_is_quantized_and_why_not(
    pqkv: Callable, tmp_path: Path, name: str, reasons: list[str], notes: list[str]
) -> None:
    model = pqkv("inspect", described(tmp_path / name, name), "--json", "-").json["model"]
    assert [layer["dense_reason"] for layer in model["layers"]] == reasons
    assert [note for note, reason in zip(model["notes"], reasons, strict=True) if not reason] == notes
    shown = " ".join(pqkv("inspect", tmp_path / name).out.split())
    assert all(f"no: {reason}" in shown for reason in filter(None, reasons))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 40}, "2 x sliding window of 40 tokens"),
        ("llama", {"model_type": "deepseek_v3", "kv_lora_rank": 8}, "latent vector per token"),
    ],
)
def test_nothing_to_quantize_is_refused_before_any_work(
    pqkv: Callable, tmp_path: Path, name: str, changes: dict[str, object], reason: str
) -> None:
    model = described(tmp_path / "model", name, **changes)
    answer = pqkv("calibrate", model, "-o", tmp_path / "run", "--data", "stdlib:calibration")
    assert answer.code == 1 and reason in " ".join(answer.err.split()), answer.err
    assert not (tmp_path / "run").exists()
