"""The adapter to lm-evaluation-harness, on a tiny task of our own and without network."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer

from pqkv_cli.errors import UsageError
from pqkv_cli.evaluation.sample_log import SampleLog
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.tasks import require_tasks, run_task
from pqkv_cli.hf.names import given_cache

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
Maker = Callable[..., Subject]
ROWS = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
CHOOSING = """
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
FILTERS = """
filter_list:
  - {{name: strict, filter: [{{function: take_first}}]}}
  - {{name: loose, filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]}}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_write]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""
FILES = {
    "choice": "task: tiny_choice" + ROWS + CHOOSING,
    "write": "task: tiny_write" + ROWS + WRITING,
    "roll": "task: tiny_roll" + ROWS + ROLLING,
    "group": GROUP,
    "filtered": "task: tiny_filtered" + ROWS + WRITING + FILTERS,
}
NUM_ROWS = 5
SIDES, LABELS = ("baseline", "quantized"), ("uncompressed", "compressed")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"question {i} " + "word " * (10 + 7 * i), "choices": ["no", "yes", "maybe"], "gold": i % 3}
        for i in range(NUM_ROWS)
    ]
    (directory / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in FILES.items():
        (directory / f"{name}.yaml").write_text(text.format(rows=directory / "rows.json"))
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def record(made: Subject, name: str, tasks: Path, mode: str = "cache", **fields: Any) -> dict[str, Any]:
    settings = EvaluationSettings(mode, context=64, **fields)  # type: ignore[arg-type]
    return run_task(name, replace(made, data=tasks), settings, lambda done, total: None)


def by_hand(made: Subject, tasks: Path) -> float:
    """Accuracy from the uncompressed model's own log-likelihoods, one choice at a time."""
    right = 0
    for line in (tasks / "rows.json").read_text().splitlines():
        row, scores = json.loads(line), []
        for choice in row["choices"]:
            # The harness scores the space before a choice as part of it.
            prompt, answer = byte_tokenizer()(row["question"].rstrip()).input_ids, byte_tokenizer()(f" {choice}").input_ids
            spaces = byte_tokenizer()(row["question"]).input_ids[len(prompt) :]
            ids = torch.tensor([[*prompt, *spaces, *answer]])
            with torch.no_grad():
                log_p = made.model(ids).logits[0, :-1].double().log_softmax(-1)
            tail = range(len(prompt) - 1, ids.shape[1] - 1)
            scores.append(sum(float(log_p[i, ids[0, i + 1]]) for i in tail))
        right += max(range(3), key=scores.__getitem__) == row["gold"]
    return right / NUM_ROWS


def test_choices_are_scored_over_quantized_keys_and_values(subject: Maker, tasks: Path) -> None:
    found = record(subject(1), "tiny_choice", tasks)
    # Asked for in mode cache, measured in the only one in which a log-likelihood means something.
    assert (found["mode"], found["notes"]["modes"]) == ("all", {"loglikelihood": "all"})
    assert found["notes"]["engine"].startswith("lm-evaluation-harness 0.4.")
    assert found["notes"]["samples"] == {"tiny_choice": NUM_ROWS}
    assert found["metrics"]["acc"]["baseline"] == pytest.approx(by_hand(subject(1), tasks))
    assert found["headline"] == ["acc"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_quantizing_changes_what_is_scored(subject: Maker, tasks: Path) -> None:
    """The trap: a forward pass without cache shows no loss."""
    rough, fine = (record(subject(bits), "tiny_roll", tasks)["metrics"]["word_perplexity"] for bits in (1, 4))
    assert rough["baseline"] == fine["baseline"]
    losses = [abs(math.log(m["quantized"] / m["baseline"])) for m in (rough, fine)]
    assert losses[0] > losses[1] > 0
    # A loss: smaller is better, so the recovery is the other way round.
    assert rough["recovery"] == pytest.approx(rough["baseline"] / rough["quantized"])


@pytest.mark.parametrize("mode", ["all", "cache"])
def test_generation_runs_on_our_cache(mode: str, subject: Maker, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, kinds = subject(), []
    generate = made.model.generate

    def spy(*words: Any, **options: Any) -> Any:
        kinds.append(type(given_cache(options)).__name__)
        return generate(*words, **options)

    monkeypatch.setattr(made.model, "generate", spy)
    found = record(made, "tiny_write", tasks, mode)
    assert (found["mode"], found["notes"]["modes"]) == (mode, {"generation": mode})
    assert set(kinds) == {"NoneType", "PositionedCache" if mode == "all" else "QuantizedCache"}
    assert found["metrics"]["exact_match"]["baseline"] == 0
    assert found["metrics"]["exact_match"]["recovery"] is None
    assert all(found["cost"][part][side]["p50"] > 0 for part in ("prefill_ms", "ms_per_token") for side in SIDES)
    assert (found["cache_bytes"]["quantized"] > 0) == (mode == "cache")
    assert found["notes"]["prompts_cut_at_the_left"] == 0


def test_the_checkpoints_own_settings_change_no_answer(subject: Maker, tasks: Path) -> None:
    made = subject()
    expected = answers(made, tasks)
    for settings in (
        {"num_beams": 3},
        {"repetition_penalty": 9.0, "max_new_tokens": 2},
        {"cache_implementation": "static", "use_cache": False},
        {"penalty_alpha": 0.6, "top_k": 4},
    ):
        for name, value in settings.items():
            setattr(made.model.generation_config, name, value)
        assert answers(made, tasks) == expected, settings
        made = subject()


def test_a_tasks_own_beams_count(subject: Maker, tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "write.yaml").read_text().replace("do_sample: false", "do_sample: false, num_beams: 3")
    (tmp_path / "write.yaml").write_text(text.replace("tiny_write", "tiny_beams"))
    assert record(subject(), "tiny_beams", tmp_path)["status"] == "complete"


def answers(made: Subject, tasks: Path) -> list[Any]:
    """What both sides wrote."""
    from pqkv_cli.evaluation.harness_model import HarnessModel

    found = []
    original = HarnessModel.generate_until

    def noting(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        found.append(original(self, requests, disable_tqdm))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HarnessModel, "generate_until", noting)
        record(made, "tiny_write", tasks)
    assert len(found) == 2
    return found


def test_a_group_has_its_tasks_and_its_own_metric(subject: Maker, tasks: Path) -> None:
    found = record(subject(), "tiny_group", tasks, limit=3)
    assert set(found["metrics"]) >= {"tiny_choice.acc", "tiny_write.exact_match", "tiny_group.acc"}
    assert found["headline"] == ["tiny_group.acc"]
    assert found["notes"]["modes"] == {"loglikelihood": "all", "generation": "cache"}
    assert found["mode"] == "cache"
    assert found["metrics"]["tiny_group.acc"]["baseline"] == found["metrics"]["tiny_choice.acc"]["baseline"]


def test_filters_are_told_apart(subject: Maker, tasks: Path) -> None:
    found = record(subject(), "tiny_filtered", tasks, limit=2)
    assert set(found["metrics"]) == {"exact_match.strict", "exact_match.loose"}


def test_the_limit_is_kept(subject: Maker, tasks: Path) -> None:
    assert record(subject(), "tiny_choice", tasks, limit=2)["notes"]["samples"] == {"tiny_choice": 2}


def test_answers_found_before_are_not_asked_for_again(subject: Maker, tasks: Path, tmp_path: Path) -> None:
    made, key = subject(), {"a": 1}
    first = record(replace(made, log=SampleLog(tmp_path / "t.jsonl", key)), "tiny_choice", tasks)
    made.model.forward = None  # nothing may be computed any more
    again = record(replace(made, log=SampleLog(tmp_path / "t.jsonl", key)), "tiny_choice", tasks)
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_write"])
def test_a_sample_with_broken_logits_is_named_and_the_rest_goes_on(name: str, subject: Maker, tasks: Path) -> None:
    made, three = subject(), byte_tokenizer()("3").input_ids[-1]

    def breaks(module: Any, words: Any, options: Any, output: Any) -> None:
        ids = options.get("input_ids", words[0] if words else None)
        output.logits[(ids == three).any(1)] = float("nan")

    hook = made.model.register_forward_hook(breaks, with_kwargs=True)
    try:
        found = record(made, name, tasks)
    finally:
        hook.remove()
    assert found["status"] == "incomplete"
    assert found["failed_samples"] == [f"{name}/3: logits of the {side} model are not finite" for side in LABELS]
    assert found["notes"]["samples"] == {name: NUM_ROWS}


def test_prompts_that_lose_their_beginning_are_counted(subject: Maker, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqkv_cli.evaluation.harness_model.num_positions", lambda model: 80)
    with pytest.warns(UserWarning, match=r"4 prompts of tiny_write are longer than the model's 80 positions allow"):
        assert record(subject(), "tiny_write", tasks)["notes"]["prompts_cut_at_the_left"] == 4


def test_what_was_asked_is_kept_for_comparison_with_the_calibration_text(subject: Maker, tasks: Path) -> None:
    made = replace(subject(), asked=[])
    record(made, "tiny_choice", tasks)
    assert len(made.asked) == 3 * NUM_ROWS
    assert made.asked[0].startswith("question 0 word")


def test_the_model_is_as_it_was(subject: Maker, tasks: Path) -> None:
    made = subject()
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        before = made.model(ids).logits
        record(made, "tiny_choice", tasks)
        assert torch.equal(made.model(ids).logits, before)


def test_a_task_that_nobody_knows(tasks: Path) -> None:
    require_tasks(["perplexity", "tiny_choice"], tasks)
    with pytest.raises(
        UsageError, match=r"there is no task 'perplexty' \(did you mean 'perplexity'\?\); known are perplexity, "
    ):
        require_tasks(["perplexty"], None)


def test_without_the_harness_its_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqkv_cli.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the tasks of lm-evaluation-harness after: pip install 'pqkv\[eval\]'"):
        require_tasks(["gsm8k"], None)


def test_the_mode_that_tells_comes_first() -> None:
    from pqkv_cli.pipeline.evaluation_settings import modes_of

    # In mode cache a task of log-likelihoods says that it was measured in mode all; then there is nothing left to measure.
    assert modes_of("tiny_choice", ("all", "cache")) == ["cache", "all"]
    assert modes_of("kld", ("all", "cache")) == ["all", "cache"]
