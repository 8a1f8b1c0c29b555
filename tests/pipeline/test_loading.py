"""In which number format the model of a recipe is opened, and what is said about it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import tiny_llama

from pqkv_cli.models import precision
from pqkv_cli.pipeline import loading
from pqkv_cli.pipeline.loading import open_model
from pqkv_cli.recipe import Recipe


class Notes(list[str]):
    """A reporter that remembers."""

    def note(self, text: str) -> None:
        self.append(text)

    def progress(self, label: str) -> Any:
        return nullcontext(lambda done, total: None)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # No tokenizer is needed to look at weights.
    monkeypatch.setattr("pqkv_cli.models.load.AutoTokenizer.from_pretrained", lambda *_, **__: None)

    def make(stored: torch.dtype, **config: Any) -> Path:
        tiny_llama().to(stored).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        read = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in read.items() if value is not None}))
        return tmp_path / "model"

    return make


def opened(model: Path, **settings: Any) -> tuple[set[torch.dtype], Notes]:
    notes = Notes()
    found, _ = open_model(Recipe(name="any", model=str(model), device="cpu", **settings), notes)
    return {each.dtype for each in found.parameters()}, notes


@pytest.mark.parametrize("says", [{}, {"dtype": None}], ids=["config", "weights alone"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_native", [False, True])
def test_auto_is_what_is_quick(
    stored: torch.dtype, is_native: bool, says: dict[str, Any], checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_natively", lambda dtype: is_native)
    monkeypatch.setattr(precision, "product_ms", lambda dtype: float(dtype.itemsize))
    found, notes = opened(checkpoint(stored, **says))
    assert found == {stored if is_native else torch.float32}
    assert len(notes) == 1 and notes[0].startswith("computing in ")


@pytest.mark.parametrize("says", [{}, {"dtype": None}], ids=["config", "weights alone"])
def test_float32_says_nothing(says: dict[str, Any], checkpoint: Any) -> None:
    assert opened(checkpoint(torch.float32, **says)) == ({torch.float32}, [])


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_what_is_asked_for_is_taken_without_a_word(asked: str, checkpoint: Any) -> None:
    assert opened(checkpoint(torch.bfloat16), dtype=asked) == ({getattr(torch, asked)}, [])


def test_quantized_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    config = type("Config", (), {"quantization_config": {"a": 1}, "dtype": torch.bfloat16})()
    config.get_text_config = lambda: config
    monkeypatch.setattr(loading, "load_config", lambda resolved: config)
    monkeypatch.setattr(loading, "load_model", lambda resolved, dtype, device: given.append(dtype) or ("model", None))
    notes = Notes()
    assert open_model(Recipe(name="any", model="demo", device="cpu"), notes)[0] == "model"
    assert (given, notes) == ([None], [])
