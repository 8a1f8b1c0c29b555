"""How LongBench words its prompts: a file ``dataset2prompt.json`` beside the rows, else lm-evaluation-harness's files."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.longbench_metrics import INSTALL
from pqkv_cli.evaluation.longbench_tasks import HARNESS_ENDS, TASKS

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
