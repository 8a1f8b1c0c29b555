"""How a stage tells somebody what it does. Knows no terminal."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int, int], None]


class Reporter(Protocol):
    """Receives notes and progress."""

    def note(self, text: str) -> None:
        """Take one sentence about what happens."""

    def progress(self, label: str) -> AbstractContextManager[Advance]:
        """Open a progress display; the yielded function takes ``(done, total)``."""


class SilentReporter:
    """Says nothing; for callers from Python."""

    def note(self, text: str) -> None:
        """Ignore the sentence."""

    def progress(self, label: str) -> AbstractContextManager[Advance]:
        """Return a display that shows nothing."""
        return nullcontext(lambda done, total: None)
