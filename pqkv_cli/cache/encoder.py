"""The encoding of one flush: what left a layer's window becomes pages in room made for them, whenever it is called."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from pqkv_cli.cache.drift import LayerDrift
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.dispatch import BackendName, encode_pages
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.prediction import left_over

_TOKENS = 4096  # encoded at a time; whole pages


@dataclass(frozen=True, slots=True, eq=False)
class EncodeJob:
    """Holds everything it reads, so that nothing it depends on can change or go before it is called.

    Attributes
    ----------
    states
        What left the window, [B, Hkv, 64 * P, D] in model space.
    angles
        ``(cos, sin)`` of its slots where the codec works before rotary embedding.
    room
        Where its pages belong: parts of page blocks that take `P` pages together.
    first_slot, text_start
        For `drift`, as `LayerDrift.observe` takes them.
    """

    backend: BackendName
    tables: Mapping[Side, CodecTables]
    states: Mapping[Side, torch.Tensor]
    angles: Mapping[Side, Angles | None]
    room: Mapping[Side, Sequence[torch.Tensor]]
    drift: LayerDrift | None
    first_slot: int
    text_start: torch.Tensor

    def __call__(self) -> None:
        """Encode keys and values, and write their pages."""
        keys = self._pages("keys")
        pages: dict[Side, torch.Tensor] = {"keys": keys, "values": self._pages("values", keys)}
        for side in SIDES:
            if self.drift is not None:
                states, angles = self.states[side], self.angles[side]
                self.drift.observe(side, states, pages, self.tables, angles, self.first_slot, self.text_start)
            left = pages[side]
            for part in self.room[side]:
                part.copy_(left[:, : part.shape[1]], non_blocking=True)
                left = left[:, part.shape[1] :]

    def _pages(self, side: Side, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Encode some tokens at a time: what encoding holds beside its result stays small beside a long prompt's states.

        `keys` are the pages of the keys, where `side` is the values: what those say of values is not coded again.
        """
        states, angles = self.states[side], self.angles[side]
        pages: list[torch.Tensor] = []
        for start in range(0, states.shape[2], _TOKENS):
            part = slice(start, start + _TOKENS)
            rotated_by = None if angles is None else (angles[0][:, part].contiguous(), angles[1][:, part].contiguous())
            vectors = states[:, :, part]
            if keys is not None:
                said_by = keys[:, start // PAGE_TOKENS : (start + _TOKENS) // PAGE_TOKENS]
                vectors = left_over(vectors, said_by, self.tables["keys"], self.tables["values"])
            pages.append(encode_pages(self.backend, vectors, self.tables[side], rotated_by))
        return pages[0] if len(pages) == 1 else torch.cat(pages, dim=1)


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
