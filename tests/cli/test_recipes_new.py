"""``pqkv recipes new``: a recipe from a model's config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pqkv_cli.recipe_files import load_recipe, parse_recipe


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "a model"))


def rewrite(model: Path, **changes: object) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_it_fits_the_model_and_is_a_recipe(pqkv: Callable, model: Path) -> None:
    answer = pqkv("recipes", "new", model)
    assert answer.code == 0, answer.err
    recipe = parse_recipe(answer.out, "stdout")
    assert (recipe.name, recipe.model) == ("a-model", str(model))
    # The model reads 1,024 tokens, fewer than windows have by default.
    assert recipe.calibration.seq_len == 1024
    # 2 layers x 2 heads x 16 channels of keys and values.
    assert "# Their cache takes 256 bytes per token in bf16, 64 as codes." in answer.out


def test_a_model_that_reads_far_keeps_the_default(pqkv: Callable, model: Path) -> None:
    rewrite(model, max_position_embeddings=131072)
    assert pqkv("recipes", "new", model, "--json", "-").json["recipe"]["calibration"]["seq_len"] == 1024


def test_a_file_that_run_takes(pqkv: Callable, model: Path, texts: tuple[Path, Path]) -> None:
    answer = pqkv("recipes", "new", model, "-o", "mine.yaml")
    assert (answer.code, "pqkv run mine.yaml" in answer.out) == (0, True)
    assert load_recipe(Path("mine.yaml")).model == str(model)
    options = ("--data", texts[0], "--samples", 4, "--seq-len", 64)
    assert pqkv("calibrate", "mine.yaml", *options).code == 0
    again = pqkv("recipes", "new", model, "-o", "mine.yaml")
    assert (again.code, "exists already" in again.err) == (2, True)


def test_a_model_without_a_layer_to_quantize(pqkv: Callable, model: Path) -> None:
    rewrite(model, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    answer = pqkv("recipes", "new", model, "-o", "mine.yaml")
    assert (answer.code, "no layer to quantize" in answer.err) == (1, True)
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["new"], "new needs a model"),
        (["new", "demo"], "demo is a recipe already"),
        (["new", "x", "--out", "mine.txt"], "ends in .yaml"),
        (["show", "demo", "--out", "mine.yaml"], "--out belongs to 'new'"),
        (["nev"], "did you mean 'new'"),
    ],
)
def test_misuse(pqkv: Callable, words: list[str], phrase: str) -> None:
    answer = pqkv("recipes", *words)
    assert (answer.code, phrase in answer.err) == (2, True), answer.err


def test_a_run_is_no_model(pqkv: Callable, exported: Path) -> None:
    answer = pqkv("recipes", "new", exported)
    assert (answer.code, "is a run; expected a model" in answer.err) == (2, True)
