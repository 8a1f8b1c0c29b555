"""What an evaluation is asked to do, as data."""

from dataclasses import dataclass
from typing import Any, Literal

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.errors import UsageError, did_you_mean

Mode = Literal["all", "cache"]
MODES: tuple[Mode, Mode] = ("all", "cache")


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Settings of one task in one mode.

    Attributes
    ----------
    mode
        ``all``: every key and value of every token is quantized; ``cache``: as the runtime really behaves.
    context
        Tokens per example; for the pass key the longest prompt.
    limit
        Most examples (windows, or prompts per cell of the grid); None takes all windows, or 5 prompts.
    chunk_tokens
        Mode ``cache`` of text tasks: tokens fed at a time. Queries of one chunk see its own keys exact, as prefill does; the
        smaller, the closer to token-by-token decoding.
    position_offset
        Added to all positions; the uncompressed model does not change under it, a cache must not either.

    Raises
    ------
    UsageError
        If a field is out of range.
    """

    mode: Mode
    context: int
    limit: int | None = None
    seed: int = 0
    chunk_tokens: int = 16
    position_offset: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}{did_you_mean(self.mode, MODES)}")
        least = {"context": 2, "chunk_tokens": 1, "position_offset": 0} | ({} if self.limit is None else {"limit": 1})
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least {low}")


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test, its tokenizer and artifact, and the held-out text of the task."""

    model: Any
    tokenizer: Any
    artifact: Artifact
    text: str
    force: bool = False
