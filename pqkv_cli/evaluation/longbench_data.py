"""Where LongBench's rows come from: a directory, a file, or the hub. Knows their columns and prompts; no models.

Rows are the published ones (``input``, ``context``, ``answers``, ``all_classes``), whose prompt is made here, or have their
whole ``prompt`` already. Prompts come from a file ``dataset2prompt.json`` beside the rows, else from lm-evaluation-harness.
"""

import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pqkv_cli.errors import DataError, did_you_mean
from pqkv_cli.evaluation.longbench_metrics import INSTALL
from pqkv_cli.evaluation.longbench_tasks import HARNESS_ENDS, TASKS
from pqkv_cli.evaluation.rows import Row, checked_row, read_rows

HUB_ID, HUB_FILE = "THUDM/LongBench", "data.zip"
PROMPTS_FILE = "dataset2prompt.json"
_COLUMNS: Mapping[str, type | tuple[type, ...]] = {"dataset": str, "answers": list}
_HOW = "give a directory of its rows with --data DIR (TASK.jsonl files, or rows of dataset, prompt, answers, all_classes)"


@dataclass(frozen=True, slots=True)
class LongBenchRow:
    """One sample: `number` counts from 0 in its `task`; `length` is the published length of its context, if known."""

    task: str
    number: int
    prompt: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None
    length: int | None


def load_longbench(path: Path | None, tasks: Sequence[str], limit: int | None) -> list[LongBenchRow]:
    """Return at most `limit` rows of each of `tasks`, in the published order of tasks.

    Raises
    ------
    DataError
        If the rows cannot be had, have wrong columns, no answers or an unknown task, or there are none of a task.
    """
    rows = _from_hub() if path is None else _from_path(path)
    found: dict[str, list[tuple[str, Row]]] = {name: [] for name in TASKS}
    for where, row in rows:
        if row["dataset"] not in found:
            nearest = did_you_mean(row["dataset"], found)
            raise DataError(f"{where}: dataset is {row['dataset']!r}{nearest}; expected one of {', '.join(found)}")
        if len(found[row["dataset"]]) < (limit or len(found[row["dataset"]]) + 1):
            found[row["dataset"]].append((where, row))
    if missing := [name for name in tasks if not found[name]]:
        raise DataError(f"{path or HUB_ID} has no rows of {', '.join(missing)}; expected rows whose dataset is one of these")
    prompts = _Prompts(path)
    return [_row(name, i, where, row, prompts) for name in tasks for i, (where, row) in enumerate(found[name])]


def tasks_in(path: Path | None) -> list[str]:
    """Return the tasks that `path` has rows of; all of them for the hub."""
    if path is None:
        return list(TASKS)
    present = {row["dataset"] for _, row in _from_path(path)}
    return [name for name in TASKS if name in present]


def _row(task: str, number: int, where: str, row: Row, prompts: "_Prompts") -> LongBenchRow:
    answers = [str(answer) for answer in row["answers"]]
    if not answers:
        raise DataError(f"{where}: answers is empty; expected at least one reference answer")
    if TASKS[task].metric == "classification" and not row.get("all_classes"):
        raise DataError(f"{where}: {task} needs all_classes, the names of its classes; found {row.get('all_classes')!r}")
    if "prompt" in row:
        prompt = str(row["prompt"])
    else:
        parts = {"input", "context"}
        near = did_you_mean("prompt", set(row) - parts)
        if not parts & row.keys() or (near and not parts <= row.keys()):
            has = ", ".join(row)
            raise DataError(f"{where} has no column 'prompt'{near}; it has {has}; expected prompt, or input and context")
        checked_row(row, {"input": str, "context": str}, where)
        prompt = prompts[task].replace("{context}", "\0").replace("{input}", row["input"]).replace("\0", row["context"])
    classes = tuple(map(str, row["all_classes"])) if row.get("all_classes") else None
    return LongBenchRow(task, number, prompt, tuple(answers), classes, row.get("length"))


def _from_path(path: Path) -> Iterable[tuple[str, Row]]:
    files = read_rows(path, _COLUMNS)
    # The files of LongBench-E hold other samples under the same names.
    return [
        (f"{path / f'{name}.jsonl' if path.is_dir() else path}, row {i}", row)
        for name, rows in files.items()
        if name[-2:] != "_e"
        for i, row in enumerate(rows)
    ]


def _from_hub() -> Iterable[tuple[str, Row]]:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset")
    except Exception as error:  # the hub's many ways to fail have no common base
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"LongBench is not here and cannot be had from the hub ({HUB_ID}: {reason}); {_HOW}") from error
    rows: list[tuple[str, Row]] = []
    with zipfile.ZipFile(file) as archive:
        for name in TASKS:
            member = next((n for n in archive.namelist() if n.rpartition("/")[2] == f"{name}.jsonl"), None)
            if member is None:
                raise DataError(f"{file} holds no {name}.jsonl; expected the published {HUB_FILE}; {_HOW}")
            with archive.open(member) as raw:
                lines = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
                rows += [(f"{name}.jsonl, row {i}", {**json.loads(line), "dataset": name}) for i, line in enumerate(lines)]
    return rows


class _Prompts:
    """The published prompts by task, found when the first is needed."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else (path if path.is_dir() else path.parent) / PROMPTS_FILE
        self._found: Mapping[str, str] | None = None

    def __getitem__(self, task: str) -> str:
        if self._found is None:
            self._found = self._load()
        return self._found[task]

    def _load(self) -> Mapping[str, str]:
        if self._file is not None and self._file.is_file():
            found: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
            if missing := [name for name in TASKS if name not in found]:
                raise DataError(f"{self._file} has no prompt for {', '.join(missing)}; expected the published {PROMPTS_FILE}")
            return found
        spec = find_spec("lm_eval")
        if spec is None or spec.origin is None:
            raise DataError(
                f"the prompts of LongBench are neither beside the rows ({PROMPTS_FILE}) nor installed; get them with: {INSTALL}"
            )
        return harness_prompts(Path(spec.origin).parent / "tasks" / "longbench")


def harness_prompts(directory: Path) -> dict[str, str]:
    """Return the published prompts, from the files of lm-evaluation-harness in `directory`."""
    prompts = {}
    for name in TASKS:
        loader = _HarnessLoader((directory / f"{name}.yaml").read_text(encoding="utf-8"))
        document: Any = loader.get_single_data()
        text = str(document["doc_to_text"])
        for theirs, ours in (("{{context}}", "{context}"), ("{{question}}", "{input}"), ("{{input}}", "{input}")):
            text = text.replace(theirs, ours)
        end, published = HARNESS_ENDS.get(name, ("", ""))
        prompts[name] = text.removesuffix(end) + published if end and text.endswith(end) else text
    return prompts


class _HarnessLoader(yaml.SafeLoader):
    """Safe YAML that reads over the harness's own tags."""


_HarnessLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
