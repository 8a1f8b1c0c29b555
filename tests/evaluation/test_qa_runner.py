"""Questions asked of both models: batches, resumption, broken logits, cost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, tokens

from pqkv_cli.evaluation.generation import Question, reply
from pqkv_cli.evaluation.qa_runner import _batches, ask
from pqkv_cli.evaluation.sample_log import SampleLog
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.names import given_cache

Maker = Callable[..., Subject]
LENGTHS = (70, 33, 70, 150, 12)


def questions(new_tokens: int = 5) -> list[Question]:
    return [Question(f"q{i}", tokens(n, seed=i), new_tokens, {"n": n}) for i, n in enumerate(LENGTHS)]


def score(question: Question, text: str) -> float:
    return float(len(text))


def answers(subject: Subject, mode: str = "cache", batch_tokens: int = 8192, asked: Any = None) -> Any:
    settings = EvaluationSettings(mode, context=256, batch_tokens=batch_tokens)  # type: ignore[arg-type]
    return ask(subject, settings, asked or questions(), score, lambda done, total: None)


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_a_batch_answers_like_one_at_a_time(mode: str, subject: Maker) -> None:
    made = subject()
    alone, together = answers(made, mode, 1), answers(made, mode, 100_000)
    assert [s["baseline"] for s in alone.samples] == [s["baseline"] for s in together.samples]
    assert [s["quantized"] for s in alone.samples] == [s["quantized"] for s in together.samples]
    assert (alone.cost["batch_size"], together.cost["batch_size"]) == (1, len(LENGTHS))
    assert [s["facts"]["n"] for s in alone.samples] == list(LENGTHS)


def test_the_baseline_is_the_model_by_itself(subject: Maker) -> None:
    made = subject()
    for question, sample in zip(questions(), answers(made).samples, strict=True):
        ids = question.ids[None]
        output = made.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=1
        )
        assert sample["baseline"]["text"] == made.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_cost_is_measured_on_both_sides(subject: Maker) -> None:
    cost = answers(subject(), batch_tokens=200).cost
    for side in ("baseline", "quantized"):
        assert cost["prefill_ms"][side]["p50"] > 0
        assert cost["ms_per_token"][side]["p20"] <= cost["ms_per_token"][side]["p50"] <= cost["ms_per_token"][side]["p90"]
        assert cost["seconds"][side] > 0
        assert cost["peak_bytes"][side] is None or cost["peak_bytes"][side] > 1_000_000


def test_bits_are_those_of_the_fullest_cache(subject: Maker) -> None:
    assert answers(subject(), batch_tokens=1).bits.num_tokens == 150 + 4
    assert answers(subject(), "all").bits.num_tokens == 0


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(subject: Maker, tmp_path: Path, monkeypatch: Any) -> None:
    made = subject()
    whole = answers(made, batch_tokens=200)
    key = {"task": "t"}
    logged = replace(made, log=SampleLog(tmp_path / "t.jsonl", key))
    asked = {"count": 0}
    plain = reply

    def dying(*words: Any) -> Any:
        asked["count"] += 1
        if asked["count"] == 3:
            raise KeyboardInterrupt
        return plain(*words)

    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner.reply", dying)
    with pytest.raises(KeyboardInterrupt):
        answers(logged, batch_tokens=200)
    done = asked["count"]
    log = SampleLog(tmp_path / "t.jsonl", key)
    assert 0 < log.num_found < len(LENGTHS)
    again = answers(replace(made, log=log), batch_tokens=200)
    assert again.samples == whole.samples
    assert asked["count"] < done + 2 * len(LENGTHS)


@pytest.mark.parametrize("side", ["baseline", "quantized"])
def test_a_sample_with_broken_logits_is_named_and_the_rest_goes_on(side: str, subject: Maker) -> None:
    made = subject()
    marker = 77
    asked = [replace(q, ids=torch.where(q.ids == marker, 78, q.ids)) for q in questions()]
    asked[2].ids[5] = marker

    def poison(module: Any, args: Any, kwargs: Any) -> None:
        past = given_cache(kwargs)
        ours = type(past).__module__.startswith("pqkv_cli")
        rows = (kwargs["input_ids"] == marker).any(1)
        state["rows"] = rows if rows.any() or kwargs["input_ids"].shape[1] > 1 else state.get("rows")
        state["now"] = ours == (side == "quantized")

    def break_rows(module: Any, args: Any, output: Any) -> Any:
        if state["now"] and state["rows"] is not None:
            output = output.clone()
            output[state["rows"]] = float("nan")
        return output

    state: dict[str, Any] = {}
    hooks = [
        made.model.register_forward_pre_hook(poison, with_kwargs=True),
        made.model.lm_head.register_forward_hook(break_rows),
    ]
    try:
        found = answers(made, asked=asked)
    finally:
        for hook in hooks:
            hook.remove()
    assert [s["name"] for s in found.scored] == ["q0", "q1", "q3", "q4"]
    assert len(found.failed) == 1
    assert found.failed[0] == f"q2: logits of the {side} model are not finite"


def test_own_stop_tokens_end_an_answer_but_not_before_its_least_length(subject: Maker) -> None:
    made, ids = subject(), tokens(40, seed=3)
    (free,) = reply(made.model, made.tokenizer, [Question("a", ids, 8)], None).texts
    assert free is not None
    first = byte_tokenizer()(free[:1]).input_ids[0]
    (stopped,) = reply(made.model, made.tokenizer, [Question("a", ids, 8, stop_ids=(first,))], None).texts
    assert stopped == ""
    (held,) = reply(made.model, made.tokenizer, [Question("a", ids, 8, stop_ids=(first,), min_new_tokens=1)], None).texts
    assert held and not held.startswith(free[:1])


def test_rows_of_unequal_length_are_padded_only_where_answers_are_long() -> None:
    def cut(lengths: list[int], new_tokens: int, budget: int = 65536, pays: int = 2**18) -> list[int]:
        asked = [Question(f"q{i}", torch.zeros(n, dtype=torch.int64), new_tokens) for i, n in enumerate(lengths)]
        return [len(batch) for batch in _batches(asked, budget, pays)]

    assert cut([7616] * 9, 32) == [8, 1]
    assert cut([7616, 7000, 7616], 32) == [2, 1]  # the longest first, so that equal ones meet
    assert cut([3000, 3100, 3200], 32) == [1, 1, 1]
    assert cut([3000, 3100, 3200], 512) == [3]
    assert (cut([3400, 3600, 4000], 64), cut([3400, 3600, 4000], 64, pays=2**16)) == ([3], [1, 1, 1])
    assert cut([7000, 7100, 7200, 7616], 512) == [2, 2]  # a mask of three would be too large


def test_questions_of_another_decoding_between_them_part_no_rows() -> None:
    lengths = [(3000, 512), (2900, 64), (2800, 512), (2800, 64), (2800, 64), (5000, 64), (2700, 512)]
    asked = [Question(f"q{i}", torch.zeros(n, dtype=torch.int64), new) for i, (n, new) in enumerate(lengths)]
    found = [[question.name for question in batch] for batch in _batches(asked, 65536, 2**16)]
    assert found == [["q5"], ["q0", "q2", "q6"], ["q1"], ["q3", "q4"]]


def test_the_uncompressed_model_answers_once_for_both_modes(subject: Maker, monkeypatch: Any) -> None:
    made, caches = subject(), []
    plain = reply

    def counting(model: Any, tokenizer: Any, batch: Any, cache: Any) -> Any:
        caches.append(cache)
        return plain(model, tokenizer, batch, cache)

    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner.reply", counting)
    first = answers(made, "all")
    second = answers(replace(made, log=SampleLog()), "cache")
    assert [cache is None for cache in caches] == [True, False, False]
    assert [s["baseline"] for s in first.samples] == [s["baseline"] for s in second.samples]
    other = [replace(q, max_new_tokens=6) for q in questions()]
    answers(made, asked=other)
    assert [cache is None for cache in caches[3:]] == [True, False]


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_a_batch_too_large_for_memory_is_halved(mode: str, subject: Maker, tmp_path: Path, monkeypatch: Any) -> None:
    made = subject()
    whole = answers(made, mode, batch_tokens=100_000)
    sizes: list[int] = []

    def small_machine(model: Any, tokenizer: Any, batch: Any, cache: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return reply(model, tokenizer, batch, cache)

    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner.reply", small_machine)
    logged = replace(made, log=SampleLog(tmp_path / "t.jsonl", {"task": "t"}), baseline={})
    with pytest.warns(UserWarning, match="out of memory with 5 prompts at once; going on with 3"):
        halved = answers(logged, mode, batch_tokens=100_000)
    assert halved.samples == whole.samples
    assert sizes == [5, 2, 2, 3, 1, 1, 2, 2] and halved.cost["batch_size"] == 2
    assert SampleLog(tmp_path / "t.jsonl", {"task": "t"}).num_found == len(LENGTHS)


def test_batches_as_large_as_one_that_failed_are_not_tried(subject: Maker, monkeypatch: Any) -> None:
    tried: list[int] = []

    def small_machine(model: Any, tokenizer: Any, batch: Any, cache: Any) -> Any:
        tried.append(len(batch))
        if len(batch) > 1:
            raise MemoryError
        return reply(model, tokenizer, batch, cache)

    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner.reply", small_machine)
    asked = [Question(f"q{i}", tokens(40, seed=i), 5) for i in range(6)]
    with pytest.warns(UserWarning, match="out of memory with 2 prompts"):
        answers(subject(), batch_tokens=90, asked=asked)
    assert tried == [2, *[1] * 12]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("shapes do not fit")])
def test_what_halving_does_not_help_is_raised(error: Exception, subject: Maker, monkeypatch: Any) -> None:
    def fails(*words: Any) -> Any:
        raise error

    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner.reply", fails)
    monkeypatch.setattr("warnings.warn", lambda *words, **options: None)
    with pytest.raises(type(error)):
        answers(subject(), batch_tokens=100_000)
