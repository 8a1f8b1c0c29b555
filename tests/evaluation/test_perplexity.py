import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject

Maker = Callable[..., Subject]


def measure(subject: Subject, mode: str = "all", **fields: Any) -> dict[str, Any]:
    settings = EvaluationSettings(mode, **{"context": 160, "limit": 3} | fields)  # type: ignore[arg-type]
    return dict(perplexity(subject, settings, lambda done, total: None).metrics)


@torch.no_grad()
def test_the_baseline_is_the_models_own_perplexity(subject: Maker) -> None:
    made = subject()
    found = measure(made)["perplexity"]["baseline"]
    windows = token_windows(made.tokenizer, made.text, 3, 160, seed=0)
    logits = made.model(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_more_bits_diverge_less(mode: str, subject: Maker) -> None:
    fine, coarse = (measure(subject(bits), mode) for bits in (4, 1))
    assert 0 < 4 * fine["kl_bits"]["quantized"] < coarse["kl_bits"]["quantized"]
    assert fine["kl_bits"]["p99"] < coarse["kl_bits"]["p99"]
    assert fine["top1_agreement"]["quantized"] >= coarse["top1_agreement"]["quantized"]
    for metrics in (fine, coarse):
        numbers = metrics["perplexity"]
        assert numbers["recovery"] == pytest.approx(numbers["baseline"] / numbers["quantized"])
        assert numbers["ci95"][0] <= numbers["recovery"] <= numbers["ci95"][1]


@pytest.mark.parametrize("bits", [1, 4])
def test_what_lies_in_the_window_loses_nothing(bits: int, subject: Maker) -> None:
    found = measure(subject(bits), "cache", context=64)
    assert found["kl_bits"]["p99"] < 1e-5
    assert found["top1_agreement"]["quantized"] == 1.0
    assert found["perplexity"]["recovery"] == pytest.approx(1, abs=1e-5)


def test_the_cache_loses_less_than_quantizing_everything(subject: Maker) -> None:
    made = subject(1)
    assert 0 < measure(made, "cache")["kl_bits"]["quantized"] < measure(made, "all")["kl_bits"]["quantized"]


def test_the_same_seed_gives_the_same_numbers(subject: Maker) -> None:
    assert measure(subject(), seed=4) == measure(subject(), seed=4)
    assert measure(subject(), seed=4) != measure(subject(), seed=5)


def test_one_window_has_no_interval_and_progress_is_told(subject: Maker) -> None:
    told: list[tuple[int, int]] = []
    settings = EvaluationSettings("all", context=100, limit=2)
    outcome = perplexity(subject(), settings, lambda *step: told.append(step))
    assert (told, outcome.num_tokens) == ([(1, 2), (2, 2)], 200)
    assert measure(subject(), limit=1)["perplexity"]["ci95"] is None


def test_what_cannot_be_measured(subject: Maker) -> None:
    with pytest.raises(DataError, match="the text has 9 tokens"):
        measure(subject(text="too short"))
    with pytest.raises(DataError, match=r"windows of 1025 tokens exceed the model's 1024 positions; use --context 1024"):
        measure(subject(), context=1025)
    broken = subject()
    with torch.no_grad():
        broken.model.lm_head.weight[3] = float("nan")
    with pytest.raises(DataError, match="the uncompressed model gives logits that are not finite"):
        measure(broken)


@torch.no_grad()
def test_with_a_stride_only_the_last_tokens_of_overlapping_windows_count(subject: Maker) -> None:
    made = subject()
    found = measure(made, stride=40)
    windows = token_windows(made.tokenizer, made.text, 3, 160, seed=0, stride=40)
    logits = made.model(windows).logits[:, -41:-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, -40:].flatten())
    assert found["perplexity"]["baseline"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert [(cell["from"], cell["to"]) for cell in found["by_context"]] == [(120, 128), (129, 159)]
    assert found["kl_bits"]["quantized"] > 0


def test_windows_a_stride_apart_share_their_tokens(subject: Maker) -> None:
    made = subject()
    windows = token_windows(made.tokenizer, made.text, None, 100, seed=0, stride=30)
    every = {tuple(window[30:].tolist()) for window in windows}
    assert sum(tuple(window[:-30].tolist()) in every for window in windows) == len(windows) - 1
    with pytest.raises(UsageError, match="stride is 160; expected less than the context of 160 tokens"):
        measure(made, stride=160)
