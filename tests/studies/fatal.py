"""Ends this process at a chosen operation on files, before it is done or with half of a write done. Knows no pipeline."""

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_KINDS = {
    "open": "create",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "make directory",
    "os.rmdir": "remove directory",
    "os.truncate": "truncate",
}


@dataclass(frozen=True)
class Operation:
    """One operation on a file: what is done, and to which place below the watched directory."""

    kind: str
    place: str


class Watch:
    """Counts the operations of this process below `root` and sends it `number` just before operation `fatal` (from 0).

    It cannot be undone, so it belongs into a forked process.
    """

    def __init__(self, root: Path, fatal: int | None = None, number: int = signal.SIGKILL) -> None:
        self.operations: list[Operation] = []
        self._root, self._fatal, self._number = str(root), fatal, number
        self._write, self._fsync = os.write, os.fsync
        os.write, os.fsync = self._half_written, self._not_synced  # audit hooks do not see these two
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _KINDS and (event != "open" or args[2] & _WRITING):
            folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            self._count(_KINDS[event], args[0], folder)

    def _half_written(self, descriptor: int, data: Any) -> int:
        self._count("write", descriptor, before=lambda: self._write(descriptor, data[: len(data) // 2]))
        return self._write(descriptor, data)

    def _not_synced(self, descriptor: int) -> None:
        self._count("sync", descriptor)
        self._fsync(descriptor)

    def _count(self, kind: str, file: Any, folder: int = -1, before: Callable[[], object] = lambda: None) -> None:
        place = _place(file, folder)
        if place != self._root and not place.startswith(self._root + os.sep):
            return
        if len(self.operations) == self._fatal:
            self._fatal = None  # signals other than SIGKILL are answered, and the answer works on files too
            before()
            os.kill(os.getpid(), self._number)
        name = os.path.relpath(place, self._root)
        self.operations.append(Operation(kind, re.sub(r"\.[0-9a-f]{12}(?=\.tmp$)", "", name)))


def _place(file: Any, folder: int) -> str:
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    within = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.join(within, os.fsdecode(file))
