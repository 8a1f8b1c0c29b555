import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.artifact.summary import MIN_SAMPLES_PER_CENTROID, calibration_errors
from pqkv_cli.benchmarks.step_speed import filled
from pqkv_cli.cache.drift import DriftAlarm, DriftMeter, DriftWarning
from pqkv_cli.runtime import Artifact, attach, load


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load(fit_artifact(tiny_llama(), tmp_path_factory.mktemp("coarse"), bits=3))


def told(model: Any, artifact: Artifact, expected: Any, ids: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, attach(model, artifact) as attached, torch.no_grad():
        warnings.simplefilter("always")
        attached._errors = expected
        cache = attached.new_cache()
        for piece in ids.split(400, dim=1):
            model(piece, past_key_values=cache)
    return [str(w.message) for w in caught]


def live_errors(model: Any, artifact: Artifact, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    seen: dict[tuple[int, str], float] = {}
    monkeypatch.setattr(DriftMeter, "add", lambda self, index, side, error: seen.update({(index, side): float(error)}))
    told(model, artifact, [{"keys": 1.0, "values": 1.0}] * 2, ids)
    monkeypatch.undo()
    return [{side: seen[index, side] for side in ("keys", "values")} for index in range(2)]


def test_a_text_like_the_calibration_is_silent_and_a_worse_one_warns_once(
    model: Any, coarse: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 1200, seed=3)
    live = live_errors(model, coarse, ids[:, :400], monkeypatch)
    assert all(0 < error < 1 for errors in live for error in errors.values())
    assert told(model, coarse, live, ids) == [
        "the text reaches 1200 tokens and the model was made for 1024; what it says "
        "beyond them is not to be trusted: shorten the prompt, or ask for fewer new tokens"
    ]
    better = [{"keys": errors["keys"] / 3, "values": errors["values"]} for errors in live]
    (warning,) = told(model, coarse, better, ids[:, :800])
    assert "the keys of this text quantize 3.0 times as badly" in warning and "calibrate on text like this one" in warning


def test_padding_does_not_count(model: Any, coarse: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(DriftMeter, "add", lambda self, index, side, error: seen.append(error))
    row = tokens(1, 200)
    padded = torch.cat((torch.zeros(1, 100, dtype=torch.int64), row), dim=1)
    both = torch.cat((tokens(1, 300), padded))
    mask = torch.ones_like(both)
    mask[1, :100] = 0
    with attach(model, coarse) as attached, torch.no_grad():
        attached._errors = [{"keys": 1.0, "values": 1.0}] * 2
        model(both, attention_mask=mask, past_key_values=attached.new_cache())
        model(torch.zeros(1, 300, dtype=torch.int64), attention_mask=mask[1:] * 0, past_key_values=attached.new_cache())
    assert len(seen) == 8
    assert all(torch.isfinite(error) for error in seen[:4]) and all(torch.isnan(error) for error in seen[4:])


def test_a_calibration_too_small_to_tell_tells_nothing(artifact: Artifact) -> None:
    header = artifact.header
    largest = max(g.num_centroids for codec in header.plan.codecs.values() for stage in codec.layout.stages for g in stage)
    assert calibration_errors(header) is None
    enough = replace(header.calibration, num_samples=100_000, reservoir_size=largest * MIN_SAMPLES_PER_CENTROID)
    told = calibration_errors(replace(header, calibration=enough))
    assert told is not None and told[0] is not None and header.relative_error[0] is not None
    assert told[0]["keys"] == pytest.approx(sum(header.relative_error[0].keys) / 2)
    fewer = replace(enough, reservoir_size=enough.reservoir_size - 1)
    assert calibration_errors(replace(header, calibration=fewer)) is None


def test_rows_without_text_do_not_hide_the_others() -> None:
    meter = DriftMeter([{"keys": 0.1, "values": 0.1}, None, {"keys": 0.1, "values": 0.1}], DriftAlarm())
    with pytest.warns(match="the values of this text quantize 4.0 times"):
        for index in (0, 2):
            meter.add(index, "keys", torch.tensor(float("nan")))
            meter.add(index, "values", torch.tensor(0.4))


def test_a_worse_text_is_told_again_and_only_that() -> None:
    alarm = DriftAlarm()
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for live in (0.15, 0.3, 0.5, 0.59, 0.7, 0.2, 1.5):
            before = len(caught)
            alarm.compare("keys", live, 0.1)
            told.append(len(caught) > before)
        assert told == [False, True, False, False, True, False, True]
        alarm.compare("values", 0.3, 0.1)
        assert "values of this text quantize 3.0 times" in str(caught[-1].message)
        alarm.compare("values", 0.0, 0.0)
        assert len(caught) == 4


@pytest.mark.parametrize("noise", [True, False])
def test_the_noise_of_a_bench_is_no_text(model: Any, coarse: Artifact, noise: bool) -> None:
    with warnings.catch_warnings(record=True) as caught, attach(model, coarse) as attached, torch.no_grad():
        warnings.simplefilter("always")
        attached._errors = [{"keys": 1e-9, "values": 1e-9}] * 2
        cache = attached.new_cache()
        filled(model, cache, 400) if noise else model(tokens(1, 400), past_key_values=cache)
    assert any(w.category is DriftWarning for w in caught) is not noise
