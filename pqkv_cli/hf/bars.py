"""The progress bars of transformers. Knows its switch for them alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import logging


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Let transformers draw no bars while the block runs: what people see is decided elsewhere."""
    switch: Any = logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()
