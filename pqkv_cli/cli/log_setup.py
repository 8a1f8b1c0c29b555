"""How the command talks on stderr: as text or as JSON lines, and how much. Knows words and streams, no verb."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TextIO

from pqkv_cli.cli.streams import json_text

SCHEMA = "pqkv.log/1"
LOG_FORMATS = ("text", "json")
FIRST_SECONDS = 5.0
HEARTBEAT_SECONDS = 30.0
# Bars of libraries (downloads, the harness) obey these; they are read when the library is first imported.
_BAR_SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")

Level = Literal["info", "warning", "error"]
Event = Literal["note", "progress", "step", "warning", "error", "library"]


@dataclass(frozen=True, slots=True)
class Voice:
    """One process's way to talk: in which format, whether only of what went wrong, and where."""

    is_json: bool = False
    is_quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    @property
    def has_bars(self) -> bool:
        """Whether somebody watches who can see a bar move."""
        return not self.is_json and not self.is_quiet and self.stream.isatty()

    def say(self, level: Level, event: Event, message: str, **facts: object) -> None:
        """Write one message; as text the level stands before it, as JSON the `facts` stand beside it."""
        if self.is_quiet and level == "info" and event != "library":
            return
        if self.is_json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"schema": SCHEMA, "time": now, "level": level, "event": event, "message": message, **facts}
            line = json_text(record, self.stream, separators=(",", ":"), default=str)
        else:
            line = message if level == "info" else f"{level}: {message}"
        self.stream.write(line + "\n")
        self.stream.flush()


def own_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line in which options are looked for: those before ``--``."""
    return list(words[: words.index("--")] if "--" in words else words)


def wanted_voice(words: Sequence[str]) -> Voice:
    """Return the voice that a command line asks for, whether or not the rest of it can be understood."""
    own = own_words(words)
    after = dict(zip(own, own[1:], strict=False))
    is_json = after.get("--log-format") == "json" or "--log-format=json" in own
    return Voice(is_json, "--quiet" in own)


_CURRENT: ContextVar[Voice | None] = ContextVar("voice", default=None)


def current_voice() -> Voice:
    """Return the voice of the running command; plain text outside of one."""
    return _CURRENT.get() or Voice()


@contextmanager
def speaking(voice: Voice) -> Iterator[None]:
    """Make `voice` the current one; what libraries write to stderr goes through it too, and bars are off unless it has them."""
    token, before = _CURRENT.set(voice), {name: os.environ.get(name) for name in _BAR_SWITCHES}
    try:
        if not voice.has_bars:
            os.environ.update(dict.fromkeys(_BAR_SWITCHES, "1"))
        if voice.is_json:
            with _LibraryLines(voice) as lines, redirect_stderr(lines):
                yield
        else:
            yield
    finally:
        _CURRENT.reset(token)
        for name, value in before.items():
            _restore(name, value)


class Heartbeat:
    """Says now and then how far a step is and how long it goes on, so that nobody takes a long one for a dead one.

    The first word comes soon, where much is left: who started something long by mistake wants to know it then.
    """

    def __init__(self, voice: Voice, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._voice, self._label, self._clock = voice, label, clock
        self._last = self._begun = clock()
        self._found: int | None = None  # what was done already when this began: of an earlier, killed command
        self._said = False

    def __call__(self, done: int, total: int) -> None:
        """Take how far it is; most of the time that is all."""
        now = self._clock()
        if self._found is None:
            self._found, self._begun = done, now
        new = done - self._found
        left = (now - self._begun) / new * (total - done) if new > 0 else None
        early = not self._said and left is not None and left >= HEARTBEAT_SECONDS and now - self._begun >= FIRST_SECONDS
        if now - self._last < HEARTBEAT_SECONDS and not early:
            return
        self._last, self._said = now, True
        facts = {"step": self._label, "done": done, "total": total} | ({} if left is None else {"seconds_left": round(left)})
        shown = f"{self._label}: {done:,} of {total:,}" + ("" if left is None else f", some {_spell(left)} left")
        self._voice.say("info", "progress", self._label if self._voice.is_json else shown, **facts)


def _spell(seconds: float) -> str:
    """Return a time as people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _LibraryLines(io.TextIOBase):
    """Stands in for stderr: every line that somebody else writes becomes one message."""

    def __init__(self, voice: Voice) -> None:
        self._voice, self._rest = voice, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in filter(str.strip, whole):
            self._voice.say("info", "library", line)
        return len(text)

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        if not self.closed and self._rest.strip():
            self.write("\n")
        super().close()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
