"""What a task came to, before it becomes a result record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BitsPerChannel:
    """Bits per cached channel and token, by what they are spent on; `asymptotic` counts codes alone.

    `cache_bytes` are the bytes of a cache of `num_tokens` tokens, uncompressed (`baseline`, in the model's dtype) and as
    held (`quantized`); zero where nothing was held. `num_read_as_codes` tokens were read as codes in the last step of the cache
    that read most of them; None where that is not counted (mode `all` reads every token as a code).
    """

    codes: float
    exact_tokens: float
    positions: float
    asymptotic: float
    num_tokens: int = 0
    cache_bytes: Mapping[str, int] = field(default_factory=lambda: {"baseline": 0, "quantized": 0})
    num_read_as_codes: int | None = None

    def document(self) -> dict[str, float]:
        """Return the record's ``bits_per_channel``."""
        return {
            "total": self.codes + self.exact_tokens + self.positions,
            "codes": self.codes,
            "scales": 0.0,
            "exact_tokens": self.exact_tokens,
            "positions": self.positions,
            "asymptotic": self.asymptotic,
        }


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Metrics of one task in one mode; `num_tokens` were looked at.

    `headline` names the metrics that stand for the task; `failed` the samples that have none, with the reason; `notes` is
    what a reader of the result must know, `mode` the one measured in where that is not the one asked for.
    """

    metrics: Mapping[str, Any]
    bits: BitsPerChannel
    num_tokens: int
    cost: Mapping[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
