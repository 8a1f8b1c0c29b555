"""``pqkv eval`` beyond the chain: honesty, resumption, generated continuations, tasks by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def evaluate(pqkv: Callable, run: Path, *words: object) -> Any:
    answer = pqkv("eval", run, *words, "--json", "-")
    assert answer.code == 0, answer.err
    return answer


def test_evaluating_on_the_calibration_text_is_said(
    pqkv: Callable, run: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    line = ("--task", "perplexity", "--mode", "all", "--limit", 1)
    clean = evaluate(pqkv, run, *line, "--data", texts[1])
    assert "warning" not in clean.err
    assert clean.json["calibration_overlap"] == {"share": 0.0, "ngram_words": 13}
    mixed = tmp_path / "mixed.txt"
    words = texts[0].read_text().split()[:1500] + texts[1].read_text().split()[:1500]
    mixed.write_text(" ".join(words))
    dirty = evaluate(pqkv, run, *line, "--data", mixed)
    assert dirty.json["calibration_overlap"]["share"] == pytest.approx(0.5, abs=0.02)
    assert "warning: 50." in dirty.err or "warning: 49." in dirty.err


def test_a_calibration_text_that_is_gone_is_said(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    recipe = run / "artifact" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(texts[0]), str(texts[0].with_name("gone.txt"))))
    line = ("--task", "perplexity", "--mode", "all", "--limit", 1, "--data", texts[1], "--json", "-")
    answer = pqkv("eval", run / "artifact", *line)
    assert answer.code == 0, answer.err
    assert answer.json["calibration_overlap"]["share"] is None
    assert "could not be read" in answer.json["calibration_overlap"]["note"]


@pytest.fixture
def small_batches() -> Iterator[None]:
    from pqkv_cli.pipeline import evaluation_settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_settings, "_LEAST_BATCH", 1024)
        patch.setattr(evaluation_settings, "_MOST_BATCH", 1024)
        yield


def test_an_interrupted_evaluation_goes_on(
    pqkv: Callable, run: Path, texts: tuple[Path, Path], small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("--task", "passkey", "--mode", "cache", "--context", 128, "--limit", 20, "--data", texts[1])
    whole = evaluate(pqkv, run, *line).json

    from pqkv_cli.evaluation import qa_runner

    plain, calls = qa_runner.reply, {"left": 3}

    def dying(*words: Any) -> Any:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return plain(*words)

    monkeypatch.setattr(qa_runner, "reply", dying)
    stopped = pqkv("eval", run, *line)
    assert (stopped.code, "the same command goes on" in stopped.err) == (130, True)
    monkeypatch.undo()
    monkeypatch.chdir(run.parent)
    assert list((run / "results" / "samples").glob("*.part.jsonl"))
    other = evaluate(pqkv, run, *line[:-4], "--limit", 1, "--data", texts[1])
    assert "going on" not in other.err  # other settings start anew, and take the file
    monkeypatch.setattr(qa_runner, "reply", dying)
    calls["left"] = 3
    assert pqkv("eval", run, *line).code == 130
    monkeypatch.undo()
    monkeypatch.chdir(run.parent)
    again = evaluate(pqkv, run, *line)
    assert "passkey, mode cache: going on after " in again.err
    assert again.json["metrics"] == whole["metrics"]
    kept = run / "results" / "samples" / "passkey-cache.jsonl"
    assert sum('"key"' in text for text in kept.read_text().splitlines()) == 101  # the head, and a line per prompt


def test_along_a_continuation(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    line = ("--task", "kld", "--generated", "--context", 32, "--max-new-tokens", 20, "--limit", 1, "--data", texts[1])
    record = evaluate(pqkv, run, *line).json
    assert (record["task"], record["mode"], record["notes"]["new_tokens"]) == ("kld_generated", "cache", 20)
    assert (run / "results" / "kld_generated-cache.json").is_file()
    misuse = pqkv("eval", run, "--task", "perplexity", "--generated")
    assert (misuse.code, "--generated belongs to the task kld" in misuse.err) == (2, True)


def test_longbench_from_a_directory(pqkv: Callable, run: Path, tmp_path: Path) -> None:
    rows = [{"dataset": "lcc", "prompt": "import os\n" * 300, "answers": ["import sys"], "all_classes": None}] * 2
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = evaluate(pqkv, run, "--task", "longbench", "--data", tmp_path / "rows", "--mode", "cache").json
    assert record["metrics"]["lcc"]["samples"] == 2
    assert record["notes"]["prompts_cut_in_the_middle"] == 2
    assert record["cost"]["ms_per_token"]["quantized"]["p50"] > 0
    assert record["cache_bytes"]["quantized"] > 0
    gated = pqkv("eval", run, "--task", "longbench", "--data", tmp_path / "rows", "--gate", "longbench.hotpotqa>=97%")
    assert (gated.code, "longbench measures average, lcc, samples, recovery" in gated.err) == (2, True)


def test_broken_logits_make_a_result_incomplete(
    pqkv: Callable, run: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pqkv_cli.evaluation import qa_runner

    plain, calls = qa_runner.reply, {"count": 0}

    def breaking(*words: Any) -> Any:
        calls["count"] += 1
        found = plain(*words)
        return replace(found, texts=[None, *found.texts[1:]]) if calls["count"] == 1 else found

    monkeypatch.setattr(qa_runner, "reply", breaking)
    answer = pqkv("eval", run, "--task", "passkey", "--mode", "all", "--context", 128, "--limit", 1, "--data", texts[1])
    assert answer.code == 1
    assert (
        "the results of passkey (all) are incomplete; 1 samples have no result: 128/0: logits of the baseline model"
        in answer.err
    )
    assert "accuracy" in answer.out
    assert json.loads((run / "results" / "passkey-all.json").read_text())["status"] == "incomplete"


def test_divergence_is_shown_by_context(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    answer = pqkv("eval", run, "--task", "kld", "--mode", "all", "--context", 300, "--limit", 1, "--data", texts[1])
    assert answer.code == 0, answer.err
    assert [word in answer.out for word in ("by tokens before", "1-128", "257-299", "top5_agreement")] == [True] * 4


def test_a_harness_task_of_one_mode_is_measured_once(pqkv: Callable, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.json").write_text('{"question": "once upon a", "choices": ["time", "hill"], "gold": 0}\n')
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    record = evaluate(pqkv, run, "--task", "mine", "--data", folder).json
    assert (record["task"], record["mode"], record["settings"]["mode"]) == ("mine", "all", "cache")
    assert [path.name for path in (run / "results").glob("mine*")] == ["mine-all.json"]


@pytest.mark.parametrize("task", ["longbench", "lines", "perplexity", "gsm8k"])
def test_data_that_are_not_there_are_an_error(task: str, pqkv: Callable, run: Path) -> None:
    answer = pqkv("eval", run, "--task", task, "--data", "nowhere")
    assert (answer.code, answer.out) == (1, "")
    assert "data nowhere is not there; expected a UTF-8 text file, rows (*.jsonl" in answer.err
