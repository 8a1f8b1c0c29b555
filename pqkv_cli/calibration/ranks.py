"""Several processes that share one calibration: which windows are whose, and how their sums and samples come together.

A launcher starts them. The first process (rank 0) owns the result. Everything goes through ``torch.distributed`` on the CPU,
in the order of the ranks, so that the same number of processes gives the same bits.

Not through ``accelerate.utils``: its ``gather`` gives every process the samples of all, and takes them only if all have equally
many, which shares of windows do not; its ``reduce`` adds in whatever order the transport likes; and both go by a state of
their own, which takes a process with a GPU to want its tensors there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pqkv_cli.errors import RunError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among all; alone, every method gives back what it is given."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process owns the result."""
        return self.rank == 0

    def share(self, num_windows: int, batch_size: int) -> range:
        """Return the numbers of this process's windows: whole batches in a row, so that batches are those of one process.

        Raises
        ------
        RunError
            If there are fewer batches than processes.
        """
        num_batches = -(-num_windows // batch_size)
        if num_batches < self.size:
            raise RunError(
                f"{self.size} processes for {num_batches} batches of {batch_size} windows; expected at least one batch for "
                f"each: start at most {num_batches} processes, or ask for a smaller --batch-size"
            )
        first, last = (num_batches * rank // self.size * batch_size for rank in (self.rank, self.rank + 1))
        return range(first, min(last, num_windows))

    def broadcast(self, value: Any) -> Any:
        """Return what the first process gives as `value`, on all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def reduce_sum(self, tensors: Tensors) -> Tensors:
        """Return on the first process the sums of all processes' `tensors`, in the order of the ranks."""
        return self._collected(tensors, lambda own, rank: own.shape, lambda parts: torch.stack(parts).sum(0))

    def gather(self, tensors: Tensors, counts: Mapping[int, int]) -> Tensors:
        """Return on the first process all processes' `tensors` one behind the other along dimension 1.

        Process `rank` has ``counts[rank]`` entries there.
        """
        return self._collected(
            tensors,
            lambda own, rank: torch.Size((own.shape[0], counts[rank], *own.shape[2:])),
            lambda parts: torch.cat(parts, dim=1),
        )

    def barrier(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def _collected(
        self,
        tensors: Tensors,
        shape: Callable[[torch.Tensor, int], torch.Size],
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> Tensors:
        if self.size == 1:
            return tensors
        collected: Tensors = {}
        for name in sorted(tensors):
            own = tensors[name].cpu().contiguous()
            if not self.is_first:
                dist.send(_bytes(own), dst=0)
                continue
            parts = [own]
            for rank in range(1, self.size):
                parts.append(own.new_empty(shape(own, rank)))
                dist.recv(_bytes(parts[-1]), src=rank)
            collected[name] = combine(parts)
        return collected if self.is_first else tensors


def current_ranks() -> Ranks:
    """Return this process among those that a process group has brought together, or alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Not every transport knows every dtype.
    return tensor.view(-1).view(torch.uint8)


# The others may wait for the first process as long as one stage lasts.
_PATIENCE = timedelta(days=7)


@contextmanager
def process_group(local_rank: int) -> Iterator[int]:
    """Join the group that the environment announces, on the GPU `local_rank` where there are GPUs; yield the process's rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # Sums and samples lie on the CPU when they are exchanged, so gloo serves every device.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
