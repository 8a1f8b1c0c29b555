"""How a stage tells somebody what it does. Knows no terminal."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int, int], None]


class Reporter(Protocol):
    """Receives notes and progress."""

    def note(self, text: str) -> None:
        """Take one sentence about what happens."""

    def progress(self, label: str) -> AbstractContextManager[Advance]:
        """Open a progress display; the yielded function takes ``(done, total)``."""
