"""The most memory a piece of work needed. Knows CUDA's counters and Linux's; elsewhere it knows nothing and says so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # see proc(5), clear_refs


class Peak:
    """Highest number of bytes, filled in when the block ends: allocated on the GPU, or resident in the process; or None."""

    num_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block; on a CPU it counts the whole process, model included."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    can_reset = False
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        can_reset = True
    yield peak
    if can_reset:
        peak.num_bytes = _resident_peak()


def _resident_peak() -> int | None:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
        return int(found[1]) * 1024 if found else None
    return None
