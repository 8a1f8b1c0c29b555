"""Takes what is written to stdout and stderr for a while: by Python's streams, or past them. Knows nothing of who writes."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

_STREAMS: Final = (("stdout", 1), ("stderr", 2))


class Spool:
    """Takes what is written to stdout and stderr while it is open; where no file can be made, it lets everything pass."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._lock = threading.Lock()
        self._file: int | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def is_open(self) -> bool:
        """Whether somebody writes into it."""
        return self._lock.locked()

    def keep(self, text: str) -> bool:
        """Keep `text` if the calling thread is the one that writes here; return whether it was kept."""
        if self._file is None or self._thread != threading.get_ident():
            return False
        os.write(self._file, text.encode(errors="replace"))
        return True

    @contextmanager
    def open(self) -> Iterator[Callable[[], str]]:
        """Take everything inside the block; yields what gives the text, once the block has ended."""
        if not self._lock.acquire(blocking=False):  # what happens inside such a block belongs to it
            yield lambda: ""
            return
        texts: list[str] = []
        try:
            self._file = _new_file() if self._file is None else self._file
            if self._file is None:
                yield lambda: ""
                return
            with ExitStack() as stack:
                stack.callback(lambda file: texts.append(_taken(file)), self._file)
                stack.enter_context(self._diverted(self._file))
                self._thread = threading.get_ident()
                yield lambda: "".join(texts)
        finally:
            self._thread = None
            self._lock.release()

    @contextmanager
    def _diverted(self, file: int) -> Iterator[None]:
        _flush()
        streams = {name: getattr(sys, name) for name, _ in _STREAMS}
        # A stream with a descriptor of its own is left as it is: libraries remember it for what they log later.
        stand_ins = {
            name: _StandIn(stream, self.keep)
            for (name, number), stream in zip(_STREAMS, streams.values(), strict=True)
            if stream is not None and not _writes_to(stream, number)
        }
        saved = {number: copy for _, number in _STREAMS if (copy := _duplicate(number)) is not None}
        try:
            for number in saved:
                os.dup2(file, number)
            for name, stand_in in stand_ins.items():
                setattr(sys, name, stand_in)
            yield
        finally:
            _flush()
            for name, stand_in in stand_ins.items():
                if getattr(sys, name) is stand_in:
                    setattr(sys, name, streams[name])
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)


class _StandIn:
    """Stands for a stream while something is imported; whoever remembers it writes to the stream itself afterwards."""

    def __init__(self, stream: Any, keep: Callable[[str], bool]) -> None:
        self._stream, self._keep = stream, keep

    def write(self, text: str) -> int:
        """Keep `text`, or hand it on."""
        return len(text) if self._keep(text) else int(self._stream.write(text))

    def writelines(self, lines: Sequence[str]) -> None:
        """Write them one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _flush() -> None:
    for name, _ in _STREAMS:
        with suppress(AttributeError, OSError, ValueError):  # none, gone or closed
            getattr(sys, name).flush()


def _writes_to(stream: Any, number: int) -> bool:
    try:
        return bool(stream.fileno() == number)
    except (AttributeError, OSError, ValueError):
        return False


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed by whoever started us
        return None


def _new_file() -> int | None:
    # A file, no pipe: nobody reads while a library writes.
    try:
        if hasattr(os, "memfd_create"):
            return os.memfd_create("pqkv")
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return None


def _taken(file: int) -> str:
    size = os.lseek(file, 0, os.SEEK_END)
    os.lseek(file, 0, os.SEEK_SET)
    text = os.read(file, size).decode(errors="replace")
    os.lseek(file, 0, os.SEEK_SET)
    os.ftruncate(file, 0)
    return text
