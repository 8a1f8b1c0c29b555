"""The protocol of LongBench: rows, prompts, cutting, chat template, stops, table."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, is_uncompressed

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.longbench import cut_middle, longbench
from pqkv_cli.evaluation.longbench_data import load_longbench, tasks_in
from pqkv_cli.evaluation.longbench_metrics import TASKS
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.names import given_cache

Maker = Callable[..., Subject]
BESIDE = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = {name: f"{name} reads {{context}} and is asked {{input}} ->" for name in TASKS}
GOLD = {
    "passage_retrieval_en": "Paragraph 4",
    "passage_retrieval_zh": "段落4",
    "passage_count": "4",
    "trec": "Date",
    "lsht": "Date",
}


def row(task: str, **changes: Any) -> dict[str, Any]:
    classes = ["Date", "Food"] if task in ("trec", "lsht") else None
    gold = GOLD.get(task, "the answer")
    return {
        "dataset": task,
        "input": "{context}?",
        "context": f"{task} text",
        "answers": [gold],
        "all_classes": classes,
    } | changes


def write(directory: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    directory.mkdir(exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "dataset2prompt.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    return directory


def run(made: Subject, data: Path, **changes: Any) -> Any:
    settings = EvaluationSettings("all", **{"context": 300, **changes})
    return longbench(replace(made, data=data), settings, lambda done, total: None)


def test_a_prompt_loses_its_middle_exactly() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(60_001))
    for longest in (3500, 3501, 60_000):
        ((found, was_cut),) = cut_middle(tokenizer, [text], longest)
        half = int(longest / 2)
        assert (found, was_cut) == (text[:half] + text[-half:], True)
    assert cut_middle(tokenizer, [text, "short"], 60_001) == [(text, False), ("short", False)]


def test_a_cut_counts_the_tokens_around_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithStart:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0, *byte_tokenizer()(text)["input_ids"]] for text in texts]}

        def decode(self, ids: list[int], **options: Any) -> str:
            return str(byte_tokenizer().decode(ids, **options))

    # 11 tokens with the beginning-of-sequence token, which counts for the first half and is not part of the text.
    assert cut_middle(WithStart(), ["0123456789"], 10) == [("0123" + "56789", True)]
    assert cut_middle(WithStart(), ["0123456789"], 11) == [("0123456789", False)]


def test_rows_of_both_kinds_and_their_prompts(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [row("hotpotqa"), {**row("lcc"), "prompt": "ready {context}"}, row("hotpotqa", input="2")])
    assert tasks_in(data) == ["hotpotqa", "lcc"]
    rows = load_longbench(data, ["hotpotqa", "lcc"], None)
    assert [(r.task, r.number) for r in rows] == [("hotpotqa", 0), ("hotpotqa", 1), ("lcc", 0)]
    # What an input holds is never filled in.
    assert rows[0].prompt == "hotpotqa reads hotpotqa text and is asked {context}? ->"
    assert rows[2].prompt == "ready {context}"
    assert [r.number for r in load_longbench(data, ["hotpotqa"], 1)] == [0]


def test_the_files_of_the_other_version_are_left_out(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [row("hotpotqa")], "hotpotqa.jsonl")
    write(data, [row("hotpotqa", input="e")] * 3, "hotpotqa_e.jsonl")
    assert len(load_longbench(data, ["hotpotqa"], None)) == 1


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"dataset": "hotpotq"}, r"row 0: dataset is 'hotpotq' \(did you mean 'hotpotqa'\?\)"),
        ({"answers": []}, "row 0: answers is empty; expected at least one reference answer"),
        ({"answers": "yes"}, r"answers is 'yes' \(str\); expected list"),
        ({"dataset": "trec", "all_classes": None}, "trec needs all_classes"),
        ({"context": 3}, r"context is '3' \(int\); expected str"),
    ],
)
def test_bad_rows(changed: dict[str, Any], phrase: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data", [row("hotpotqa", **changed)])
    with pytest.raises(DataError, match=phrase):
        load_longbench(data, tasks_in(data) or ["hotpotqa"], None)


def test_a_missing_column_and_a_missing_task(tmp_path: Path) -> None:
    bad = {name: value for name, value in row("hotpotqa").items() if name != "input"} | {"inputs": "x"}
    with pytest.raises(DataError, match=r"has no column 'input' \(did you mean 'inputs'\?\)"):
        load_longbench(write(tmp_path / "data", [bad]), ["hotpotqa"], None)
    bad = {"dataset": "lcc", "answers": ["x"], "promt": "x"}
    with pytest.raises(DataError, match=r"more.rows.jsonl, row 0 has no column 'prompt' \(did you mean 'promt'\?\)"):
        load_longbench(write(tmp_path / "more", [bad]), ["lcc"], None)
    with pytest.raises(DataError, match="has no rows of lcc"):
        load_longbench(write(tmp_path / "other", [row("hotpotqa")]), ["hotpotqa", "lcc"], None)


def test_offline_without_data_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="LongBench is not here and cannot be had from the hub .*; give a directory of its rows with --data"
    ):
        load_longbench(None, ["hotpotqa"], None)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in TASKS:
            archive.writestr(f"data/{name}.jsonl", json.dumps(row(name, input="Q\u2028", dataset="?")) + "\n")
    asked: list[Any] = []

    def download(*words: str, **options: str) -> str:
        asked.append((words, options))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    rows = load_longbench(None, tasks_in(None), None)
    assert [r.task for r in rows] == list(TASKS)
    assert rows[0].prompt.endswith("Question: Q\u2028\n\nAnswer:")
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]


@pytest.mark.skipif(not (BESIDE / "longbench").is_dir(), reason="the published prompts do not lie beside the repository")
def test_prompts_and_lengths_are_the_published_ones() -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from pqkv_cli.evaluation.longbench_data import harness_prompts

    published = json.loads((BESIDE / "longbench" / "dataset2prompt.json").read_text(encoding="utf-8"))
    assert harness_prompts(Path(lm_eval.__file__).parent / "tasks" / "longbench") == published
    lengths = json.loads((BESIDE / "longbench" / "dataset2maxlen.json").read_text(encoding="utf-8"))
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == lengths


@pytest.mark.skipif(not (BESIDE / "minilongbench").is_dir(), reason="MiniLongBench does not lie beside the repository")
def test_real_rows_of_all_tasks_can_be_read() -> None:
    rows = load_longbench(BESIDE / "minilongbench", tasks_in(BESIDE / "minilongbench"), None)
    assert (len(rows), {r.task for r in rows}) == (237, set(TASKS))
    byte_lengths = [len(r.prompt.encode()) for r in rows]
    assert max(byte_lengths) > 200_000
    ((found, was_cut),) = cut_middle(byte_tokenizer(), [rows[byte_lengths.index(max(byte_lengths))].prompt], 4000)
    assert was_cut and len(found.encode()) in range(3990, 4010)


def replying(made: Subject, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, dict[str, Any]]]) -> None:
    """The uncompressed side answers rightly; the compressed side only the tasks that end with an even letter."""

    def generate(ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = []
        for line, mask in zip(ids, attention_mask, strict=True):
            text = made.tokenizer.decode(line[mask.bool()], skip_special_tokens=True)
            seen.append((text, options))
            task = max((name for name in TASKS if f"{name} reads" in text), key=len)
            right = is_uncompressed(given_cache(options)) or task in ("hotpotqa", "lcc")
            rows.append(made.tokenizer(f"{GOLD.get(task, 'the answer') if right else 'x'}\nmore".ljust(24)).input_ids)
        width = max(map(len, rows))
        return torch.cat((ids, torch.tensor([r[:width] for r in rows])), dim=1)

    monkeypatch.setattr(made.model, "generate", generate)


def test_the_table(subject: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, seen = subject(), []
    replying(made, monkeypatch, seen)
    names = ["hotpotqa", "lcc", "trec", "passage_count"]
    rows = [row(name, length=n) for name in names for n in (100, 5000)]
    outcome = run(made, write(tmp_path / "data", rows))
    scores = {name: (m["baseline"], m["quantized"]) for name, m in outcome.metrics.items() if name in names}
    # "the answer\nmore": of the QA task all words count, "answer more" against "answer".
    assert scores == {"hotpotqa": (66.67, 66.67), "lcc": (100.0, 100.0), "trec": (100.0, 0.0), "passage_count": (100.0, 0.0)}
    average = outcome.metrics["average"]
    assert (average["baseline"], average["quantized"]) == (91.67, 41.67)
    assert average["recovery"] == pytest.approx((2 / 3 + 1) / (2 / 3 + 3))
    assert (outcome.metrics["samples@0-4k"]["baseline"], outcome.metrics["samples@4-8k"]["quantized"]) == (91.67, 41.67)
    assert outcome.headline == ("average",)
    assert outcome.notes.items() >= {"tasks": 4, "prompts_cut_in_the_middle": 0, "chat_template": False}.items()


def test_each_task_is_asked_as_published(subject: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("rouge", reason="the extra `eval` is not installed")
    made, seen = subject(), []
    replying(made, monkeypatch, seen)
    monkeypatch.setattr(made.tokenizer, "chat_template", "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<b>")
    names = ["hotpotqa", "samsum", "lcc", "trec", "triviaqa"]
    run(made, write(tmp_path / "data", [row(name, context="c" * 400) for name in names]))
    for text, options in seen:
        task = max((name for name in TASKS if f"{name} reads" in text), key=len)
        assert text.startswith("<u>") == text.endswith("<b>") == TASKS[task].takes_chat
        assert len(text) == 300 + (len("<u></u><b>") if TASKS[task].takes_chat else 0)
        assert options["max_new_tokens"] == TASKS[task].max_new_tokens
        newline = made.tokenizer("\n").input_ids[-1]
        assert (newline in options["eos_token_id"]) == (task == "samsum")
        assert options["min_new_tokens"] == (1 if task == "samsum" else None)
        assert options["do_sample"] is False


def test_prompts_that_do_not_fit(subject: Maker, tmp_path: Path) -> None:
    data = write(tmp_path / "data", [row("hotpotqa", context="c" * 2000)])
    with pytest.raises(
        DataError, match=r"hotpotqa/0, cut to 1000 tokens, is asked in 1000 and answered in 32: more than .* use --context 928"
    ):
        run(subject(), data, context=1000)
