"""stdout and stderr that lose nothing they could keep: what an encoding cannot write is escaped, a reader may leave.

A finished result must not be lost because a terminal takes ASCII only, and a run must not end because ``head`` has seen enough.
"""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from pqkv_cli.errors import PqkvError

_ESCAPES = "backslashreplace"


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let stdout and stderr escape what they cannot encode and outlive their readers, inside the block."""
    before = sys.stdout, sys.stderr
    with ExitStack() as after:
        sys.stdout = _lasting(before[0], after)
        sys.stderr = _lasting(before[1], after)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _flush(stream)
            sys.stdout, sys.stderr = before


def json_text(document: object, stream: TextIO | None = None, **options: Any) -> str:
    """Return `document` as one JSON text that `stream` (default: a file in UTF-8) can take: with ASCII escapes if need be."""
    text = json.dumps(document, ensure_ascii=False, **options)
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # another encoding, or half of a surrogate pair, which none can write
        return json.dumps(document, ensure_ascii=True, **options)
    return text


def write_result(text: str) -> None:
    """Write `text`, the result that a program waits for, to stdout.

    Raises
    ------
    PqkvError
        If nobody reads stdout any more.
    """
    sys.stdout.write(text)
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if getattr(raw, "is_gone", False):
        raise PqkvError(
            f"nobody reads stdout any more, so {len(text):,} characters of JSON were lost; the work is done and its files are "
            "written: read stdout to its end, or name a file with --json FILE"
        )


class _Pipe(io.FileIO):
    """A file descriptor that takes everything once its reader has gone."""

    is_gone = False

    def write(self, data: Any) -> int:
        if not self.is_gone:
            try:
                return super().write(data)
            except BrokenPipeError:
                self.is_gone = True
        return memoryview(data).nbytes


class _Nowhere(io.RawIOBase):
    """Stands in for a stream that was closed before the process began."""

    is_gone = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.is_gone = True
        return memoryview(data).nbytes


def _lasting(stream: TextIO | None, after: ExitStack) -> TextIO:
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Nowhere()), encoding="utf-8", errors=_ESCAPES)
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # somebody else's: it is theirs to know what it takes
    if stream not in (sys.__stdout__, sys.__stderr__) or stream.isatty():
        after.callback(stream.reconfigure, errors=stream.errors)
        stream.reconfigure(errors=_ESCAPES)
        return stream
    stream.flush()
    # Never closed: loggers of libraries keep it until the process ends.
    pipe = io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(pipe, encoding=stream.encoding, errors=_ESCAPES, line_buffering=stream.line_buffering)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:  # of a full disk: the command has said so by now, and what waits would only be tried again at exit
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, _Pipe):
            raw.is_gone = True
            stream.flush()
