"""What an evaluation is asked to do, as data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.errors import UsageError, did_you_mean
from pqkv_cli.evaluation.generation import Replies
from pqkv_cli.evaluation.sample_log import SampleLog

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
        Most examples (windows, prompts per cell of a grid, rows per data set); None is the task's own choice.
    chunk_tokens
        Mode ``cache`` of text tasks: tokens fed at a time. Queries of one chunk see its own keys exact, as prefill does; the
        smaller, the closer to token-by-token decoding.
    position_offset
        Added to all positions; the uncompressed model does not change under it, a cache must not either.
    batch_tokens
        Most padded tokens, answers included, of the prompts answered at once; at least one prompt is.
    max_new_tokens
        Longest continuation, where the task leaves it open.
    stride
        Tasks on text: windows begin so many tokens apart, and only the last so many predictions of each count; with None they
        are disjoint and all count.

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
    batch_tokens: int = 8192
    max_new_tokens: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}{did_you_mean(self.mode, MODES)}")
        least = {
            "context": 2,
            "chunk_tokens": 1,
            "position_offset": 0,
            "batch_tokens": 1,
            "limit": 1,
            "max_new_tokens": 1,
            "stride": 1,
        }
        for name, low in least.items():
            found = getattr(self, name)
            if found is not None and found < low:
                raise UsageError(f"{name} is {found}; expected at least {low}")
        if self.stride is not None and self.stride >= self.context:
            raise UsageError(f"stride is {self.stride}; expected less than the context of {self.context} tokens")


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test, its tokenizer and artifact, and what the task reads: held-out text, or rows at the path `data`.

    What the task finds out goes to `log`, sample by sample. What the uncompressed model answered to a batch stays in
    `baseline`, so that it is not asked again for another mode. Tasks whose text is neither `text` nor in `data` put what they
    asked into `asked`, for a comparison with the calibration text.
    """

    model: Any
    tokenizer: Any
    artifact: Artifact
    text: str
    force: bool = False
    data: Path | None = None
    log: SampleLog = field(default_factory=SampleLog)
    baseline: dict[str, Replies] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
