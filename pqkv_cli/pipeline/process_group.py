"""The process group of a launcher, for as long as a verb lasts. Knows no verbs and no environment."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# The others may wait for the first process as long as one stage lasts.
_PATIENCE = timedelta(days=7)


@contextmanager
def process_group(local_rank: int) -> Iterator[int]:
    """Join the group that the environment announces, on the GPU `local_rank` where there are GPUs; yield the process's rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # What meets are sums and samples on the CPU, so gloo serves every device.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
