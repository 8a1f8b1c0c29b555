"""Rows and prompts of LongBench: from files on disk, and its wording from a file beside them or from lm-evaluation-harness."""

import io
import json
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pqkv_cli.calibration.row_text import BadRow
from pqkv_cli.calibration.table_files import parsed_line, stem_of
from pqkv_cli.errors import DataError, did_you_mean, first_line
from pqkv_cli.evaluation.longbench_metrics import HARNESS_ENDS, INSTALL, TASKS
from pqkv_cli.evaluation.rows import Kinds, Row, checked_row, checked_text, checked_texts, read_row_files, shown

PROMPTS_FILE, LENGTHS_FILE = "dataset2prompt.json", "dataset2maxlen.json"


class Prompts:
    """The published prompts by task, found when the first is needed."""

    def __init__(self, path: Path | None) -> None:
        self._file = _beside(path, PROMPTS_FILE)
        self._found: Mapping[str, Any] | None = None

    def __getitem__(self, task: str) -> str:
        if self._found is None:
            self._found = _harness() if self._file is None else _read(self._file)
        if task not in self._found:
            raise DataError(f"{self._file} has no prompt for {task}; expected the published {PROMPTS_FILE}")
        prompt = self._found[task]
        is_text = isinstance(prompt, str) and prompt == prompt.encode(errors="ignore").decode()
        if not is_text or "{context}" not in prompt:
            raise DataError(
                f"{self._file}: the prompt of {task} is {str(prompt)[:40]!r}; expected a text with {{context}} in it, "
                f"as in the published {PROMPTS_FILE}"
            )
        return str(prompt)


def check_answer_lengths(path: Path | None) -> None:
    """Look at ``dataset2maxlen.json`` beside the rows, if it is there: answers are as long as published.

    Raises
    ------
    DataError
        If it is damaged, or says other lengths than those that are used.
    """
    file = _beside(path, LENGTHS_FILE)
    if file is None:
        return
    found = _read(file)
    for name, task in TASKS.items():
        if name in found and found[name] != task.max_new_tokens:
            raise DataError(
                f"{file} says {found[name]!r} for {name}; answers have the published {task.max_new_tokens} tokens: "
                f"put the published {LENGTHS_FILE} there, or remove it"
            )


def _beside(path: Path | None, name: str) -> Path | None:
    file = None if path is None else (path if path.is_dir() else path.parent) / name
    return file if file is not None and file.is_file() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected the published {file.name}, or none") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a {type(found).__name__}; expected an object by task, as in the published {file.name}")
    return found


def _harness() -> dict[str, str]:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise DataError(
            f"the prompts of LongBench are neither beside the rows ({PROMPTS_FILE}) nor installed; get them with: {INSTALL}"
        )
    directory = Path(spec.origin).parent / "tasks" / "longbench"
    try:
        return harness_prompts(directory)
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            f"the prompts of LongBench in {directory} cannot be read ({error}); put the published {PROMPTS_FILE} beside the "
            f"rows, or get them with: {INSTALL}"
        ) from error


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


HUB_ID, HUB_FILE = "THUDM/LongBench", "data.zip"
_COLUMNS: dict[str, Kinds] = {"dataset": str, "answers": list}
_E = "_e"
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
    found: dict[str, list[tuple[str, Row]]] = {name: [] for name in TASKS}
    for where, row in _rows(path):
        if len(found[row["dataset"]]) < (limit or len(found[row["dataset"]]) + 1):
            found[row["dataset"]].append((where, row))
    if missing := [name for name in tasks if not found[name]]:
        raise DataError(f"{path or HUB_ID} has no rows of {', '.join(missing)}; expected rows whose dataset is one of these")
    check_answer_lengths(path)
    prompts = Prompts(path)
    return [_row(name, i, where, row, prompts) for name in tasks for i, (where, row) in enumerate(found[name])]


def tasks_in(path: Path | None) -> list[str]:
    """Return the tasks that `path` has rows of; all of them for the hub.

    Raises
    ------
    DataError
        If there are none, or a row is of no known task.
    """
    if path is None:
        return list(TASKS)
    present = {row["dataset"] for _, row in _rows(path)}
    return [name for name in TASKS if name in present]


def is_longbench_e(path: Path | None) -> bool:
    """Return whether the rows of `path` are those of LongBench-E."""
    return path is not None and all(is_e for is_e, _, _ in _tagged(path))


def _row(task: str, number: int, where: str, row: Row, prompts: Prompts) -> LongBenchRow:
    answers = checked_texts(row["answers"], "answers", where)
    if not answers:
        raise DataError(f"{where}: answers is empty; expected at least one reference answer")
    if TASKS[task].metric == "classification" and not row.get("all_classes"):
        raise DataError(f"{where}: {task} needs all_classes, the names of its classes; found {row.get('all_classes')!r}")
    classes = None
    if row.get("all_classes") is not None:
        checked_row(row, {"all_classes": list}, where)
        classes = checked_texts(row["all_classes"], "all_classes", where) or None
    if row.get("length") is not None:
        checked_row(row, {"length": int}, where)
    return LongBenchRow(task, number, _prompt(task, where, row, prompts), answers, classes, row.get("length"))


def _prompt(task: str, where: str, row: Row, prompts: Prompts) -> str:
    if "prompt" in row:
        prompt = checked_text(row["prompt"], "prompt", where)
    else:
        parts = {"input", "context"}
        near = did_you_mean("prompt", set(row) - parts)
        if not parts & row.keys() or (near and not parts <= row.keys()):
            has = ", ".join(row)
            raise DataError(f"{where} has no column 'prompt'{near}; it has {has}; expected prompt, or input and context")
        checked_row(row, {"input": str, "context": str}, where)
        own, context = (checked_text(row[name], name, where) for name in ("input", "context"))
        prompt = context.join(part.replace("{input}", own) for part in prompts[task].split("{context}"))
    if not prompt.strip():
        raise DataError(f"{where}: the prompt is empty; expected a text to ask. Correct or remove the row.")
    return prompt


def _rows(path: Path | None) -> list[tuple[str, Row]]:
    """Return the rows of the version that is read, each with where it stands and the plain name of its task."""
    if path is None:
        return list(_from_hub())
    tagged = _tagged(path)
    both = {is_e for is_e, _, _ in tagged} == {True, False}
    if both:
        count = sum(is_e for is_e, _, _ in tagged)
        warnings.warn(
            f"{path}: {count} rows of LongBench-E (TASK_e) are left out, because rows of LongBench are there", stacklevel=3
        )
    return [(where, row) for is_e, where, row in tagged if not (both and is_e)]


def _tagged(path: Path) -> list[tuple[bool, str, Row]]:
    """Return all rows of `path`: whether each is of LongBench-E, where it stands, and itself under its task's plain name."""
    tagged = []
    for file, rows in read_row_files(path, _COLUMNS).items():
        of_file = _plain(stem_of(file)) != stem_of(file)
        for i, row in enumerate(rows):
            where, name = f"{file}, row {i}", _plain(row["dataset"])
            if name not in TASKS:
                nearest = did_you_mean(row["dataset"], TASKS)
                raise DataError(f"{where}: dataset is {row['dataset']!r}{nearest}; expected one of {', '.join(TASKS)}")
            tagged.append((of_file or name != row["dataset"], where, {**row, "dataset": name}))
    return tagged


def _plain(name: str) -> str:
    """Return the name of a task of LongBench-E without its end; any other name as it is."""
    short = name.removesuffix(_E)
    return short if short in TASKS else name


def _from_hub() -> list[tuple[str, Row]]:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset")
    except Exception as error:  # the hub's many ways to fail have no common base
        raise DataError(
            f"LongBench is not here and cannot be had from the hub ({HUB_ID}: {first_line(error)}); {_HOW}"
        ) from error
    try:
        with zipfile.ZipFile(file) as archive:
            return [row for name in TASKS for row in _archived(archive, name, file)]
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} is damaged ({error}); expected the published {HUB_FILE}: delete it and try again, or {_HOW}"
        ) from error


def _archived(archive: zipfile.ZipFile, name: str, file: str) -> Iterable[tuple[str, Row]]:
    member = next((n for n in archive.namelist() if n.rpartition("/")[2] == f"{name}.jsonl"), None)
    if member is None:
        raise DataError(f"{file} holds no {name}.jsonl; expected the published {HUB_FILE}; {_HOW}")
    with archive.open(member) as raw:
        for i, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8", newline="\n")):
            row, where = parsed_line(line), f"{name}.jsonl, row {i}"
            if isinstance(row, BadRow) or not isinstance(row, dict):
                reason = row.reason if isinstance(row, BadRow) else f"is {shown(row)}"
                raise DataError(f"{file}: {where} {reason}; expected an object: delete the file and try again, or {_HOW}")
            yield where, checked_row({**row, "dataset": name}, _COLUMNS, where)
