"""What a task has found out so far, group by group of samples, in a file that an interrupted evaluation goes on with.

A JSON line per sample, then one that closes its group: samples of a group that was never closed are measured again, so
results do not depend on where an evaluation was interrupted. The first line says what was asked; a file about something
else is begun anew. Knows no tasks.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.errors import RunError

SCHEMA = "pqkv.samples/1"
Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples measured together, and facts about their measurement."""

    samples: Sequence[Sample]
    facts: Mapping[str, Any]


class SampleLog:
    """The samples of one task in one mode; without a `path` none are kept.

    Parameters
    ----------
    path
        The finished file; until then it lies beside it as ``NAME.part.jsonl``.
    key
        Everything the samples depend on, as plain data.
    """

    def __init__(self, path: Path | None = None, key: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._part = None if path is None else path.with_name(f"{path.stem}.part.jsonl")
        self._head = json.dumps({"schema": SCHEMA, "key": key}, sort_keys=True)
        self._groups: dict[str, Group] = {}
        if self._part is not None and self._part.is_file():
            self._read(self._part)

    @property
    def num_found(self) -> int:
        """Samples held."""
        return sum(len(group.samples) for group in self._groups.values())

    def get(self, name: str) -> Group | None:
        """Return the group called `name`, None where it is not measured yet."""
        return self._groups.get(name)

    def add(self, name: str, samples: Sequence[Sample], facts: Mapping[str, Any]) -> Group:
        """Keep a group, on disk before this returns, and return it as it would be read back.

        Raises
        ------
        RunError
            If the file cannot be written.
        """
        lines = [json.dumps({"group": name, **sample}, ensure_ascii=False) for sample in samples]
        lines.append(json.dumps({"group": name, "closed": facts}))
        if self._part is not None:
            start = [] if self._part.is_file() else [self._head]
            _append(self._part, "".join(line + "\n" for line in [*start, *lines]).encode("utf-8", "backslashreplace"))
        *kept, closed = (json.loads(line) for line in lines)
        group = Group([_without_group(sample) for sample in kept], closed["closed"])
        if self._path is not None:
            self._groups[name] = group
        return group

    def finish(self) -> None:
        """Give the file its final name: the next evaluation measures again."""
        if self._part is not None and self._path is not None and self._part.is_file():
            os.replace(self._part, self._path)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        head, _, body = data.partition(b"\n")
        if head.decode("utf-8", "replace") != self._head:
            path.unlink()
            return
        samples: list[Sample] = []
        good = end = len(head) + 1
        for line in body.splitlines(keepends=True):
            end += len(line)
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break  # the process died in the middle of this line
            if "closed" in entry:
                own = [_without_group(sample) for sample in samples if sample["group"] == entry["group"]]
                self._groups[entry["group"]] = Group(own, entry["closed"])
                good, samples = end, []
            else:
                samples.append(entry)
        if good < len(data):
            os.truncate(path, good)


def _without_group(sample: Sample) -> Sample:
    return {name: value for name, value in sample.items() if name != "group"}


def _append(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path} cannot be written: {reason}; free some space or fix the rights, then run again") from error
