"""What answering cost, summed up over the batches of each side. Knows plain data of batches; times nothing itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Batch = Mapping[str, Any]


def answering_cost(sides: Mapping[str, Sequence[Batch]]) -> dict[str, Any]:
    """Return a record's ``cost`` from the batches of each side, as `Replies.cost` gives them.

    Milliseconds until the first token and per further token of a batch (quantiles), peak bytes, seconds of all batches, joules.
    """
    peaks = {side: [b["peak_bytes"] for b in own if b["peak_bytes"] is not None] for side, own in sides.items()}
    return {
        "prefill_ms": {side: _quantiles([b["prefill_ms"] for b in own if b["prefill_ms"]]) for side, own in sides.items()},
        "ms_per_token": {side: _quantiles([ms for b in own for ms in b["step_ms"]]) for side, own in sides.items()},
        "peak_bytes": {side: max(own) if own else None for side, own in peaks.items()},
        "seconds": {side: sum(b["seconds"] for b in own) for side, own in sides.items()},
        "energy": {side: _energy([b.get("energy", {}) for b in own]) for side, own in sides.items()},
    }


def _energy(batches: Sequence[Batch]) -> dict[str, Any]:
    """Return joules until the first token of a batch and per further token, or None with the reason of the first without."""
    missing = [str(batch.get("reason")) for batch in batches if batch.get("decode") is None]
    num_tokens = sum(batch.get("num_tokens", 0) for batch in batches)
    if missing or not num_tokens:
        reason = missing[0] if missing else "no further tokens were answered"
        return {"prefill_joules": None, "joules_per_token": None, "reason": reason}
    prefill, decode = (sum(batch[part] for batch in batches) for part in ("prefill", "decode"))
    return {"prefill_joules": prefill / len(batches), "joules_per_token": decode / num_tokens, "reason": None}


def _quantiles(values: list[float]) -> dict[str, float | None]:
    points = {"p20": 20, "p50": 50, "p90": 90}
    return {name: float(np.percentile(values, point)) if values else None for name, point in points.items()}
