"""``pqkv calibrate --fisher`` and what becomes of it."""

from collections.abc import Callable
from pathlib import Path

import torch

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.fitting.record import load_record
from pqkv_cli.recipe_files import load_recipe


def test_the_fit_uses_gradients_where_calibration_measured_them(
    pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path]
) -> None:
    words = ("calibrate", tiny_model, "--data", texts[0], "--samples", 20, "--seq-len", 64, "--batch-size", 4, "-o", "mine")
    fit = ("fit-codebooks", "mine", "--iterations", 2)
    assert pqkv(*words, "--fisher").code == 0
    assert load_recipe(Path("mine/recipe.yaml")).calibration.fisher == 1
    weights = CalibrationStore("mine/calibration").layer(0).key_weight
    assert weights is not None and float(weights.std()) > 0
    assert pqkv(*fit).code == 0
    record = load_record(Path("mine/codebooks"))
    assert (record.settings.key_weighting, record.settings.value_weighting) == ("fisher", "fisher")
    # A word less is not another wish: what the run was asked for before stays.
    assert "already done" in pqkv("calibrate", "mine").err
    answer = pqkv("calibrate", "mine", "--no-fisher")
    assert (answer.code, "calibration.fisher changed from 1 to 0" in answer.err) == (0, True), answer.err
    assert CalibrationStore("mine/calibration").layer(0).key_weight is None
    assert pqkv(*fit).code == 0
    without = load_record(Path("mine/codebooks"))
    assert without.settings.key_weighting == "sqrt"
    assert without.layers_sha256 != record.layers_sha256


def test_other_samples_stay_as_they_are(pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path]) -> None:
    words = ("calibrate", tiny_model, "--data", texts[0], "--samples", 4, "--seq-len", 64)
    assert pqkv(*words, "-o", "without").code == pqkv(*words, "--fisher", "-o", "with").code == 0
    first, second = (CalibrationStore(f"{name}/calibration").layer(1) for name in ("without", "with"))
    for name in ("keys", "values", "attention_mass"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name))
