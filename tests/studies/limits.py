"""Does a call within limits of time and memory. Knows Linux's way of counting; nothing of what is called."""

import faulthandler
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SECONDS = 5.0
MOST_BYTES = 100 * 2**20


class HangError(BaseException):
    """A call has not come to its end in time."""


@dataclass
class Cost:
    """The longest call so far, and the most memory that one has taken beyond what was held before."""

    seconds: float = 0.0
    resident_bytes: int = 0


def limited(call: Callable[[], Any], cost: Cost) -> BaseException | None:
    """Return what `call` raised, None where it returned; any allocation beyond `MOST_BYTES` fails within it.

    A call that does not even answer signals ends the process with a traceback.
    """
    before = signal.signal(signal.SIGALRM, _hang)
    faulthandler.dump_traceback_later(4 * MOST_SECONDS, exit=True, file=sys.__stderr__)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = _reset_peak()
    resource.setrlimit(resource.RLIMIT_AS, (_kilobytes("VmSize") + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    started = time.perf_counter()
    raised: BaseException | None = None
    try:
        call()
    except (Exception, HangError) as error:
        raised = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cost.seconds = max(cost.seconds, time.perf_counter() - started)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    cost.resident_bytes = max(cost.resident_bytes, _kilobytes("VmHWM") - held)
    return raised


def _hang(number: int, frame: Any) -> None:
    raise HangError(f"longer than {MOST_SECONDS:g} s")


def _reset_peak() -> int:
    """Forget the peak of resident memory; return what is resident now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS")


def _kilobytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name + ":"))
