"""Rows, prompts and folders of LongBench in every shape: read, or refused by name; nothing is asked that was not meant."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.longbench_data import is_longbench_e, load_longbench, tasks_in
from pqkv_cli.evaluation.longbench_metrics import TASKS
from pqkv_cli.evaluation.tasks import check_rows

PROMPTS = {name: "{context} and {input}" for name in TASKS}


def row(task: str = "hotpotqa", **changes: Any) -> dict[str, Any]:
    own = {"dataset": task, "input": "q", "context": "c", "answers": ["a"], "all_classes": None, "length": 3}
    return {name: value for name, value in {**own, **changes}.items() if value is not ...}


def write(folder: Path, name: str, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (folder / "dataset2prompt.json").write_text(json.dumps(PROMPTS))
    return folder


def load(path: Path) -> list[Any]:
    return load_longbench(path, tasks_in(path), None)


VALUES: list[Any] = [
    None,
    3,
    1.5,
    True,
    [],
    ["a", "a"],
    [["a"]],
    [None],
    [3],
    {},
    {"a": 1},
    "",
    " \n",
    "\ud83d",
    ["\ud83d"],
    [""],
    ...,
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", ["dataset", "prompt", "input", "context", "answers", "all_classes", "length"])
def test_a_field_of_any_shape_is_read_as_meant_or_refused(name: str, value: Any, tmp_path: Path) -> None:
    bad = row(**{name: value}, **({"input": ..., "context": ...} if name == "prompt" else {}))
    folder = write(tmp_path / "x", "hotpotqa.jsonl", row(), bad)
    try:
        _, found = load(folder)
    except DataError as error:
        assert "hotpotqa.jsonl, row 1" in str(error) or "hotpotqa.jsonl, line 2" in str(error)
        return
    assert found.prompt.strip() and all(isinstance(answer, str) for answer in found.answers)
    assert found.length is None or type(found.length) is int
    given = (value,) if isinstance(value, str) else ()
    assert name not in ("input", "context") or (
        found.prompt == ("c and " + value if name == "input" else value + " and q") and given
    )


@pytest.mark.parametrize("line", ["null", "3", "[]", '"x"', "{", "{}", "NaN", '{"dataset": "hotpotqa"}', "[" * 2000])
def test_a_line_of_any_shape_is_named(line: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "hotpotqa.jsonl", row(), "", line)
    with pytest.raises(DataError, match=r"hotpotqa.jsonl, line 3"):
        load(folder)
    with pytest.raises(DataError, match=r"hotpotqa.jsonl, line 3"):
        check_rows(["longbench"], folder)


@pytest.mark.parametrize("name", ["hotpotqa_e.jsonl", "rows.jsonl", "hotpotqa_e.jsonl.gz"])
@pytest.mark.parametrize("dataset", ["hotpotqa", "hotpotqa_e"])
def test_longbench_e_is_read_where_there_is_nothing_else(name: str, dataset: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", name, row(dataset))
    for path in (folder, folder / name):
        assert tasks_in(path) == ["hotpotqa"]
        assert [found.task for found in load(path)] == ["hotpotqa"]
        assert is_longbench_e(path) == ("_e" in name or "_e" in dataset)


def test_of_both_versions_the_plain_one_is_read_and_that_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "hotpotqa_e.jsonl", row(context="e"), row(context="e"))
    write(folder, "qasper.jsonl", row("qasper"))
    with pytest.warns(UserWarning, match=r"2 rows of LongBench-E \(TASK_e\) are left out"):
        assert [found.task for found in load(folder)] == ["qasper"]
    assert not is_longbench_e(folder)


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_packed_rows_are_rows(packed: str, tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "x", f"qasper.jsonl{packed}", row("qasper")))) == 1


def test_rows_of_parquet_are_rows(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write(tmp_path / "x", "notes.txt")
    parquet.write_table(arrow.Table.from_pylist([row(), row(answers=["b"])]), folder / "hotpotqa.parquet")
    assert [found.answers for found in load(folder)] == [("a",), ("b",)]


def test_a_line_of_csv_that_does_not_fit_its_columns_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "hotpotqa.csv", "prompt,answers", "hotpotqa,x,y")
    with pytest.raises(DataError, match="hotpotqa.csv, line 1 has 3 cells for 2 columns"):
        load(folder)


def test_folders_without_rows_say_what_they_hold(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "notes.txt")
    with pytest.raises(DataError, match=r"holds no rows; expected JSON lines .* it holds dataset2prompt.json, notes.txt"):
        tasks_in(folder)
    write(folder, "hotpotqa.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        tasks_in(folder)
    write(folder, "hotpotqa.jsonl", row())
    write(folder, "hotpotqa.jsonl.gz", row())
    with pytest.raises(DataError, match=r"holds the same rows twice \(hotpotqa.jsonl, hotpotqa.jsonl.gz\).*remove one"):
        tasks_in(folder)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", r"dataset2prompt.json cannot be read \(.*; expected the published dataset2prompt.json, or none"),
        ("[]", "dataset2prompt.json holds a list; expected an object by task"),
        ("\udcff", "dataset2prompt.json cannot be read"),
        ("{}", "dataset2prompt.json has no prompt for hotpotqa"),
        ('{"hotpotqa": null}', r"the prompt of hotpotqa is 'None'; expected a text with \{context\} in it"),
        ('{"hotpotqa": "\\ud83d {context}"}', "the prompt of hotpotqa is .*; expected a text"),
        ('{"hotpotqa": "{input}"}', "the prompt of hotpotqa is '{input}'; expected a text"),
    ],
)
def test_a_damaged_file_of_prompts_is_named(content: str, phrase: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "hotpotqa.jsonl", row())
    (folder / "dataset2prompt.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=phrase):
        load(folder)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", r"dataset2maxlen.json cannot be read \("),
        ("3", "dataset2maxlen.json holds a int; expected an object by task"),
        ('{"hotpotqa": 99}', "dataset2maxlen.json says 99 for hotpotqa; answers have the published 32 tokens"),
        ('{"hotpotqa": null}', "dataset2maxlen.json says None for hotpotqa"),
    ],
)
def test_a_file_of_lengths_that_is_not_the_published_one_is_named(content: str, phrase: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "hotpotqa.jsonl", row())
    (folder / "dataset2maxlen.json").write_text(content)
    with pytest.raises(DataError, match=phrase):
        load(folder)
    (folder / "dataset2maxlen.json").write_text(json.dumps({name: task.max_new_tokens for name, task in TASKS.items()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(folder)) == 1


@pytest.mark.parametrize("found", [[], [3], [None]])
def test_rows_of_lines_are_looked_at_too(found: list[Any], tmp_path: Path) -> None:
    bad = {"prompt": "x", "expected_number": 1, "num_lines": 2, "random_idx": found}
    (tmp_path / "5.jsonl").write_text(json.dumps(bad))
    with pytest.raises(DataError, match="row 0: random_idx is .*; expected a list that begins with the name of a line"):
        check_rows(["lines"], tmp_path)
    (tmp_path / "5.jsonl").write_text(json.dumps({**bad, "random_idx": ["a"], "expected_number": True}))
    with pytest.raises(DataError, match=r"expected_number is 'True' \(bool\); expected int"):
        check_rows(["lines"], tmp_path)
