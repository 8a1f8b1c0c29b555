"""Codes of un-rotated keys hold at every position, or the model is refused before any window is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES, family_model
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.calibration.rotation_check import check_rotation
from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.models import families
from pqkv_cli.models.geometry import geometry


def follow_rotation_by(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    from transformers.models.llama import modeling_llama

    right = modeling_llama.apply_rotary_pos_emb

    def wrong(queries: torch.Tensor, keys: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = right(queries, keys, *rest)
        return queries, change(keys)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_passes(name: str, dtype: torch.dtype) -> None:
    model = family_model(name).to(dtype)
    check_rotation(model, geometry(model.config), tokens(64))


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat"])
def test_families_whose_keys_do_not_end_with_the_rotation_are_coded_after_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, name, dict(num_hidden_layers=2, num_experts=4, moe_topk=2))
    model = family_model(name)
    assert all(layer.rotary is None for layer in geometry(model.config).layers)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "key_layernorm" in key:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    monkeypatch.setattr(
        families, "FAMILIES", {key: facts for key, facts in families.FAMILIES.items() if key != name}
    )  # without its row
    with pytest.raises(UnsupportedModelError, match=f"layer 0 of this {name} model does something to its keys after rotary"):
        check_rotation(model, geometry(model.config), tokens(64))


@pytest.mark.parametrize(
    "change",
    [lambda keys: keys * torch.linspace(0.5, 1.5, 16), lambda keys: keys.roll(1, dims=-1), lambda keys: torch.tanh(keys)],
    ids=["factor", "permutation", "bound"],
)
def test_what_follows_the_rotation_is_found_before_any_window(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_rotation_by(monkeypatch, change)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* un-rotated keys differ by .*; expected at most 0\.02"):
        fit_artifact(tiny_llama(), tmp_path)
    assert not (tmp_path / "calibration").exists()


def test_what_commutes_with_the_rotation_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    follow_rotation_by(monkeypatch, lambda keys: keys * 3 / keys.norm(dim=-1, keepdim=True))
    model = tiny_llama()
    check_rotation(model, geometry(model.config), tokens(64))


def test_short_models_and_short_texts_are_checked_too() -> None:
    model = tiny_llama(max_position_embeddings=16)
    check_rotation(model, geometry(model.config), tokens(8))
    check_rotation(model, geometry(model.config), tokens(16))  # no room: nothing to compare, and nothing refused
