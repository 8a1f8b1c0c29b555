"""Encoding beside the model: jobs that turn states into codes, in order; whoever reads the codes waits for their job.

On a GPU jobs run on a stream of their own while the model goes on; elsewhere they are done when they are handed in. Knows in
which order a device works, not what the jobs do.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

Job = Callable[[], None]


class Running(Protocol):
    """A job that was begun and may not be done."""

    def wait(self) -> None:
        """Let what the device is given from here on come after the job, without stopping the host."""

    def finish(self) -> None:
        """Stop the host until the job is done."""


class EncoderQueue:
    """The jobs of one cache, done in the order in which they were handed in.

    A job that runs is held until it was waited for, and with it every tensor it reads or writes: their memory is given to
    nobody else before. `max_pending` bounds how many, and so what they hold: the exact keys and values of one layer.
    """

    max_pending = 1

    def __init__(self) -> None:
        self._num_jobs = 0
        self._pending: deque[tuple[int, Running]] = deque()

    def submit(self, job: Job, device: torch.device) -> int:
        """Begin `job`, whose tensors lie on `device`, and return its number for `wait`."""
        while len(self._pending) >= self.max_pending:
            self.wait(self._pending[0][0])
        running = self.start(job, device)
        self._num_jobs += 1
        if running is not None:
            self._pending.append((self._num_jobs, running))
        return self._num_jobs

    def start(self, job: Job, device: torch.device) -> Running | None:
        """Begin `job`; None if it is done already."""
        if device.type == "cuda":
            return SideJob.begin(job, device)
        job()
        return None

    def wait(self, number: int) -> None:
        """Let what the device is given from here on come after job `number` and all before it, without stopping the host."""
        while self._pending and self._pending[0][0] <= number:
            self._pending[0][1].wait()
            self._pending.popleft()

    def finish(self) -> None:
        """Stop the host until all jobs are done: for what changes, copies or drops the memory that they write."""
        while self._pending:
            self._pending[0][1].finish()
            self._pending.popleft()


@dataclass(frozen=True, slots=True, eq=False)
class SideJob:
    """A job on the side stream of a GPU.

    Attributes
    ----------
    job
        Held for the tensors in it: they came from `stream`, whose allocator knows nothing of the side stream, so they must
        live until `stream` comes after `done`.
    stream
        Where the model ran when the job was handed in.
    done
        Recorded on the side stream behind the job.
    """

    job: Job
    stream: torch.cuda.Stream
    done: torch.cuda.Event

    @classmethod
    def begin(cls, job: Job, device: torch.device) -> "SideJob":
        """Give `job` to the side stream of `device`, behind everything that the model's stream has been given."""
        side, stream = _side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            job()
            done = torch.cuda.Event()
            done.record(side)
        return cls(job, stream, done)

    def wait(self) -> None:
        """Let the model's stream, and the present one where it is another, come after the job."""
        self.stream.wait_event(self.done)
        present = torch.cuda.current_stream(self.stream.device)
        if present != self.stream:
            present.wait_event(self.done)

    def finish(self) -> None:
        """Stop the host until the job is done."""
        self.wait()
        self.done.synchronize()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all caches: what jobs leave behind for later ones, such as samples of their errors, stays in order.
    return torch.cuda.Stream(device)
