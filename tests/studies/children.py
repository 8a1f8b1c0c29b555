"""Runs ``pqkv`` in forked children, so that one import serves many runs and each ends as a process of its own."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (imported once, for all children)

import pqkv_cli.pipeline.stages  # noqa: F401
from pqkv_cli.cli.main import main

_TEN_YEARS_S = 10 * 365 * 86400


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and what it wrote to stderr."""

    code: int
    log: str


@dataclass(frozen=True)
class Child:
    """A process at work."""

    pid: int
    log: Path

    def ended(self) -> Ended:
        """Wait for its end."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, self.log.read_text(encoding="utf-8", errors="replace"))


def start_child(action: Callable[[], int], log: Path) -> Child:
    """Do `action` in a child whose output goes to `log`; its result is the exit code."""
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        _be_child(action, log)
    return Child(pid, log)


def in_child(action: Callable[[], int], log: Path, kill_after_s: float | None = None) -> Ended:
    """Do `action` in a child, kill it after some time if asked to, and return how it ended."""
    child = start_child(action, log)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child.pid, signal.SIGKILL)
    return child.ended()


def pqkv(*words: object) -> Callable[[], int]:
    """Return the action of the command ``pqkv WORDS``."""
    return lambda: main([str(word) for word in words])


def with_other_clock(action: Callable[[], int], run: Path, rng: random.Random) -> Callable[[], int]:
    """Return `action` on a machine whose clock has jumped, over a `run` whose files seem written in any order, any year."""
    jump, real = rng.uniform(-_TEN_YEARS_S, _TEN_YEARS_S), time.time

    def jumped() -> int:
        paths: Sequence[Path] = sorted(run.rglob("*"))
        for path in paths:
            moment = real() + rng.uniform(-_TEN_YEARS_S, _TEN_YEARS_S)
            os.utime(path, (moment, moment))
        time.time = lambda: real() + jump
        return action()

    return jumped


def _be_child(action: Callable[[], int], log: Path) -> None:
    code = 99
    try:
        sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
        for stream in (1, 2):
            os.dup2(sys.stderr.fileno(), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
