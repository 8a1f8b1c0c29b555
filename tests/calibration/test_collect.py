"""What a calibration leaves behind, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import quiet

from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError, RunError, UnsupportedModelError
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model


def test_dense_layers_store_nothing(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    collect(model, windows, tmp_path, settings, quiet)
    store = CalibrationStore(tmp_path)
    assert store.layer(1).keys.shape == (2, 60, 16)
    with pytest.raises(RunError, match="stays dense \\(sliding window"):
        store.layer(0)
    with pytest.raises(RunError, match=r"layers 0\.\.1"):
        store.layer(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer-001.safetensors", "manifest.json", "windows.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("projection", "name"), [("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries")])
def test_non_finite_activations_name_layer_and_head(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, bad: float, projection: str, name: str
) -> None:
    model = random_model(attention_bias=True)
    with torch.no_grad():
        row = 17 if projection != "q_proj" else 33  # the second kv head
        getattr(model.model.layers[0].self_attn, projection).bias[row] = bad
    with pytest.raises(DataError, match=rf"{name} of layer 0, key/value head 1 are not finite"):
        collect(model, windows, tmp_path, settings, quiet)


def test_fp16_overflow_names_layer_head_and_value(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model(attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.bias[3] = 70000.0
    with pytest.raises(DataError, match=r"values of layer 1, key/value head 0 reach 70000.*fp16 storage overflowed"):
        collect(model, windows, tmp_path, settings, quiet)


def test_windows_must_fit(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[7, 24\]; expected \[8, 24\]"):
        collect(random_model(), windows[:7], tmp_path, settings, quiet)
    with pytest.raises(DataError, match=r"24 tokens; the model reads at most 16"):
        collect(random_model(max_position_embeddings=16), windows, tmp_path, settings, quiet)
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        collect(random_model("mistral", sliding_window=8), windows, tmp_path, settings, quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_temporary_file(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pqkv_cli.files.os.replace", full)
        with pytest.raises(RunError, match=r"No space left on device.*run again"):
            collect(random_model(), windows, tmp_path, settings, quiet)
    assert not list(tmp_path.rglob("*.tmp"))
    collect(random_model(), windows, tmp_path, settings, quiet)
    assert CalibrationStore(tmp_path).layer(0).keys.shape == (2, 60, 16)


def test_damaged_files_are_named(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Run pqkv calibrate"):
        CalibrationStore(tmp_path)
    collect(random_model(), windows, tmp_path, settings, quiet)
    path = tmp_path / "layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"layer-001\.safetensors is damaged"):
        CalibrationStore(tmp_path).layer(1)
    (tmp_path / "manifest.json").write_text('{"schema": "pqkv.calibration/99"}')
    with pytest.raises(RunError, match=r"calibration/99.*expected 'pqkv\.calibration/1'"):
        CalibrationStore(tmp_path)


def test_model_is_left_in_its_mode(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    model = random_model().train()
    collect(model, windows, tmp_path, settings, quiet)
    assert model.training


def test_a_real_model(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(resolve_model(str(stories)))
    windows = token_windows(tokenizer, "Once upon a time there was a little dog named Tim. " * 400, 8, 64, seed=0)
    settings = CollectSettings("", 8, 64, batch_size=4, reservoir_size=256)
    collect(model, windows, tmp_path, settings, quiet)
    samples = CalibrationStore(tmp_path).layer(4)
    assert samples.keys.shape == (4, 256, 8)
    assert bool((samples.attention_mass >= 0).all())
    assert bool((torch.linalg.eigvalsh(samples.query_moment) > -1e-9).all())
