"""Ends this process, or fails it, at a chosen operation on files, before it is done or with half of a write done.

Knows no pipeline.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Collection
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
_KINDS_THAT_WRITE = ("create", "write", "sync", "rename", "make directory")


@dataclass(frozen=True)
class Operation:
    """One operation on a file: what is done, and to which place below the watched directory."""

    kind: str
    place: str


def killing(number: int = signal.SIGKILL) -> Callable[[Operation], None]:
    """Return what ends a process, or asks it to end, with a signal."""
    return lambda _: os.kill(os.getpid(), number)


def refusing(number: int, kinds: Collection[str] = _KINDS_THAT_WRITE) -> Callable[[Operation], None]:
    """Return what fails operations of some kinds as the kernel does, with the error `number`."""

    def refuse(operation: Operation) -> None:
        if operation.kind in kinds:
            raise OSError(number, os.strerror(number), operation.place)

    return refuse


def make_unreadable(path: Path) -> None:
    """Fail every opening of `path` from now on, as for a user who may not read it. Cannot be undone."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | os.PathLike) and os.path.abspath(args[0]) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    sys.addaudithook(hook)


class Watch:
    """Counts the operations of this process below `root`; just before operation `fatal` (from 0) comes the `end`.

    With `lasts` every later operation meets the `end` too. It cannot be undone, so it belongs into a forked process.
    """

    def __init__(
        self, root: Path, fatal: int | None = None, end: Callable[[Operation], None] | None = None, *, lasts: bool = False
    ) -> None:
        self.operations: list[Operation] = []
        self._root, self._fatal, self._end, self._lasts = str(root), fatal, end or killing(), lasts
        self._number = 0
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
        name = os.path.relpath(place, self._root)
        operation = Operation(kind, re.sub(r"\.[0-9a-f]{12}(?=\.tmp$)", "", name))
        number, self._number = self._number, self._number + 1
        if self._fatal is not None and (number == self._fatal or (self._lasts and number > self._fatal)):
            if not self._lasts:
                before()
            self._end(operation)
        self.operations.append(operation)


def _place(file: Any, folder: int) -> str:
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    within = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.join(within, os.fsdecode(file))
