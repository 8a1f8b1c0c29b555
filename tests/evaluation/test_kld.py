from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.kld import kld, kld_generated
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.text_windows import by_context, spans
from pqkv_cli.hf.names import cache_argument

Maker = Callable[..., Subject]


def silent(done: int, total: int) -> None:
    return None


def test_kld_is_perplexity_without_perplexity(subject: Maker) -> None:
    settings = EvaluationSettings("all", context=200, limit=2)
    plain, full = kld(subject(), settings, silent), perplexity(subject(), settings, silent)
    assert plain.metrics == {name: value for name, value in full.metrics.items() if name != "perplexity"}
    assert 0 <= plain.metrics["top5_agreement"]["quantized"] <= 1


@pytest.mark.parametrize(
    ("length", "expected"),
    [(50, [(0, 50)]), (128, [(0, 128)]), (300, [(0, 128), (128, 256), (256, 300)]), (512, [(0, 128), (128, 256), (256, 512)])],
)
def test_spans_cover_every_position_once(length: int, expected: list[tuple[int, int]]) -> None:
    assert spans(length) == expected


def test_by_context_averages_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.random((3, 300)) for name in ("kl_bits", "agrees", "top5", "baseline_nll", "quantized_nll")}
    cells = by_context(rows)
    sizes = [cell["to"] - cell["from"] + 1 for cell in cells]
    assert sum(sizes) == 300
    whole = sum(size * cell["kl_bits"] for size, cell in zip(sizes, cells, strict=True)) / 300
    assert whole == pytest.approx(rows["kl_bits"].mean())
    assert cells[0]["baseline_perplexity"] == pytest.approx(np.exp(rows["baseline_nll"][:, :128].mean()))


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_along_a_continuation(mode: str, subject: Maker) -> None:
    made = subject(1)
    settings = EvaluationSettings(mode, context=64, limit=2, max_new_tokens=140)  # type: ignore[arg-type]
    outcome = kld_generated(made, settings, silent)
    assert outcome.metrics == kld_generated(made, settings, silent).metrics
    kl_bits = outcome.metrics["kl_bits"]
    assert kl_bits["quantized"] > 0
    assert [(cell["from"], cell["to"]) for cell in outcome.metrics["by_step"]] == [(1, 128), (129, 140)]
    assert outcome.notes == {"new_tokens": 140, "temperature": 1.0}
    # The first token is predicted from the prompt; the compressed model is then shown what the other one wrote.
    assert outcome.bits.num_tokens == (0 if mode == "all" else 64 + 139)


def test_the_compressed_model_is_shown_the_others_tokens(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = subject(), {True: [], False: []}
    forward = made.model.forward

    def spy(ids: Any = None, cache: Any = None, past_key_values: Any = None, **options: Any) -> Any:
        given = cache if past_key_values is None else past_key_values
        if ids is None:  # the step that attach checks
            return forward(**cache_argument(forward, given), **options)
        seen[type(given).__module__.startswith("pqkv_cli")].append(ids.tolist())
        return forward(ids, **cache_argument(forward, given), **options)

    monkeypatch.setattr(made.model, "forward", spy)
    kld_generated(made, EvaluationSettings("cache", context=32, limit=1, max_new_tokens=9), silent)
    assert seen[True] == seen[False]
    assert [len(rows[0]) for rows in seen[True]] == [32] + [1] * 8


def test_what_does_not_fit_is_said(subject: Maker) -> None:
    settings = EvaluationSettings("cache", context=1000, limit=1, max_new_tokens=100)
    with pytest.raises(DataError, match=r"exceed the model's 1024 positions; use a smaller --context or --max-new-tokens 24"):
        kld_generated(subject(), settings, silent)


def test_a_window_with_broken_logits_is_named_and_the_rest_goes_on(subject: Maker) -> None:
    made, calls = subject(), {"count": 0}

    def break_one(module: Any, args: Any, output: Any) -> Any:
        calls["count"] += 1
        return output * float("nan") if calls["count"] == 2 else output

    hook = made.model.lm_head.register_forward_hook(break_one)
    try:
        outcome = perplexity(made, EvaluationSettings("all", context=64, limit=3), silent)
    finally:
        hook.remove()
    assert len(outcome.failed) == 1
    assert outcome.failed[0].startswith("window 0: the compressed model gives logits that are not finite")
    assert np.isfinite(outcome.metrics["kl_bits"]["quantized"])


def test_nothing_but_broken_windows_is_an_error(subject: Maker) -> None:
    made = subject()
    hook = made.model.lm_head.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(DataError, match="no window could be measured: the uncompressed model gives logits"):
            perplexity(made, EvaluationSettings("all", context=64, limit=2), silent)
    finally:
        hook.remove()
