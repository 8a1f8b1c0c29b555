"""A number of the device on its way to the host, so that decoding never waits for it."""

import torch


class AsyncScalar:
    """A copy of `tensor`, one number, in the memory of the host: started now and read later.

    Reading waits for the work that was given to the device before the copy, never for what came after it: read in a later
    step, it waits for nothing.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> torch.Tensor:
        """Return the number, a tensor of no dimensions on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
