"""Rivals beside the artifact: the same windows, the same calibration, everything counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.baselines.comparison import (
    Contestant,
    compare,
    fit_rival,
    metrics,
    own_contestant,
    peer_records,
    rival_contestant,
)
from pqkv_cli.baselines.registry import parse_rivals
from pqkv_cli.calibration.store import CalibrationStore, rotated
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles

SETTINGS = EvaluationSettings("all", context=96, limit=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CalibrationStore:
    directory = tmp_path_factory.mktemp("calibrated")
    fit_artifact(tiny_llama(), Path(directory), 4)
    return CalibrationStore(Path(directory) / "calibration")


def judged(subject: Subject, contestants: list[Contestant]) -> list[dict[str, Any]]:
    told: list[tuple[int, int]] = []
    num_tokens = compare(subject, SETTINGS, contestants, lambda *step: told.append(step))
    assert (num_tokens, told) == (3 * 96, [(1, 3), (2, 3), (3, 3)])
    return peer_records(subject, SETTINGS, contestants, num_tokens)


def test_our_row_is_what_the_perplexity_task_finds(subject: Callable[..., Subject]) -> None:
    made = subject()
    (record,) = judged(made, [own_contestant(made.artifact)])
    alone = perplexity(made, SETTINGS, lambda done, total: None)
    for name in ("kl_bits", "top1_agreement", "perplexity"):
        for key, value in record["metrics"][name].items():
            assert value == pytest.approx(alone.metrics[name][key], rel=1e-6), (name, key)
    assert record["bits_per_channel"] == alone.bits.document()
    assert (record["method"], record["artifact_sha256"]) == ("pqkv", made.artifact.sha256)


def test_rivals_get_records_of_their_own(subject: Callable[..., Subject], store: CalibrationStore) -> None:
    made = subject()
    contestants = [
        rival_contestant(rival, store, made.model, 0) for rival in parse_rivals("kivi:4,kivi:2,kvquant:2,rotatekv:2")
    ]
    records = judged(made, contestants)
    assert [(r["method"], r["native_bits"], r["status"], r["artifact_sha256"]) for r in records] == [
        ("kivi", 4, "complete", None),
        ("kivi", 2, "complete", None),
        ("kvquant", 2, "complete", None),
        ("rotatekv", 2, "complete", None),
    ]
    fine, coarse, sparse, rotated_record = records
    assert fine["metrics"]["kl_bits"]["quantized"] < coarse["metrics"]["kl_bits"]["quantized"]
    # Keys: 96 tokens are three blocks of 32; values: groups of 32 of a token's 32 channels.
    assert coarse["bits_per_channel"]["total"] == pytest.approx(3.0)
    assert (coarse["bits_per_channel"]["codes"], coarse["bits_per_channel"]["scales"]) == (2.0, 1.0)
    assert sparse["bits_per_channel"]["outliers"] > 0.1
    for record, sinks in ((sparse, 1), (rotated_record, 4)):
        assert record["bits_per_channel"]["exact_tokens"] == pytest.approx(16 * sinks / 96)
        parts = record["bits_per_channel"]
        assert parts["total"] == pytest.approx(sum(parts[k] for k in ("codes", "scales", "outliers", "exact_tokens")))
    assert coarse["cost"]["fit_seconds"] >= 0


def test_layers_are_predicted_from_decoded_ones_in_the_cache(subject: Callable[..., Subject], store: CalibrationStore) -> None:
    made = subject()
    contestants = [rival_contestant(rival, store, made.model, 0) for rival in parse_rivals("higgs:2,aqua-kv:2,nsnquant:2")]
    plain, predicted, normalized = judged(made, contestants)
    assert [r["at_rest"] for r in (plain, predicted, normalized)] == [False, True, False]
    # Residuals are no larger than what they are residuals of, and the first layer has four bits.
    assert predicted["metrics"]["kl_bits"]["quantized"] < plain["metrics"]["kl_bits"]["quantized"]
    layers = len([codecs for codecs in contestants[1].codecs if codecs])
    tokens = 92 / 96  # all but four
    assert plain["bits_per_channel"]["codes"] == pytest.approx(2 * tokens)
    assert predicted["bits_per_channel"]["codes"] == pytest.approx((2 + 2 / layers) * tokens)
    assert (plain["table_bytes"], predicted["table_bytes"] > 0) == (0, True)
    # One block of 64 tokens, and 32 that fill none.
    assert normalized["bits_per_channel"]["codes"] == pytest.approx(2 * 64 / 96)
    assert normalized["bits_per_channel"]["exact_tokens"] == pytest.approx(16 * 32 / 96)


def test_a_rival_that_cannot_be_fitted_says_why_and_stops_nobody(
    subject: Callable[..., Subject], store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    made = subject()
    contestants = [rival_contestant(rival, store, made.model, 0) for rival in parse_rivals("quanto:4,rtn:4")]
    failed, good = judged(made, contestants)
    assert failed["status"] == "unavailable" and "pip install 'pqkv[quantized-cache]'" in failed["error"]
    assert (failed["metrics"], failed["bits_per_channel"]) == ({}, {})
    assert good["status"] == "complete"


def test_samples_after_rotary_embedding_are_what_the_cache_sees() -> None:
    model = tiny_llama()
    ids = tokens(1, 40, seed=7)
    seen: dict[int, AttentionStep] = {}

    class Watcher:
        def attention(self, layer_index: int, step: AttentionStep) -> None:
            seen[layer_index] = step

    with torch.no_grad(), tap(model, Watcher()):
        model(ids)
    layer = geometry(model.config).layers[1]
    assert layer.rotary is not None
    keys, positions = seen[1].keys[0], torch.arange(40)
    plain = rotated(keys, -positions, rotary_angles(model, 1), layer.rotary)  # turned back
    torch.testing.assert_close(rotated(plain, positions, rotary_angles(model, 1), layer.rotary), keys, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, keys, atol=0.1)


def test_keys_are_coded_where_the_rival_says(store: CalibrationStore) -> None:
    model = tiny_llama()
    before, after = (fit_rival(rival, store, model, 0) for rival in parse_rivals("kvquant:4,kivi:4"))
    for first, second in zip(before, after, strict=True):
        assert first is not None and second is not None
        assert first["keys"].rotary == geometry(model.config).layers[0].rotary
        assert (second["keys"].rotary, first["values"].rotary) == (None, None)


def test_positions_move_post_rope_codes_only(subject: Callable[..., Subject], store: CalibrationStore) -> None:
    # A rival before rotary embedding decodes the same keys wherever the text starts.
    made = subject()
    found = {}
    for name in ("kvquant:2", "rtn:2"):
        for offset in (0, 500):
            (rival,) = parse_rivals(name)
            contestant = rival_contestant(rival, store, made.model, 0)
            settings = EvaluationSettings("all", context=96, limit=2, position_offset=offset)
            compare(made, settings, [contestant], lambda done, total: None)
            found[name, offset] = metrics(contestant.parts, 0)["kl_bits"]["quantized"]
    assert found["kvquant:2", 500] == pytest.approx(found["kvquant:2", 0], rel=0.01)
    assert abs(found["rtn:2", 500] / found["rtn:2", 0] - 1) > 1e-4
