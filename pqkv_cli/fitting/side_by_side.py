"""Layers side by side, one thread each. Knows nothing of what is done with a layer.

Most steps of a fit are too small to share: two threads in one k-means take longer than one each in two. With one thread per
layer its bytes do not depend on how many there are, either.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

import torch

from pqkv_cli.specs import ModelGeometry

# Channels of keys of all layers at hand: with the 24,576 vectors that are kept by default they take some 12 GB.
MOST_CHANNELS = 8192

Result = TypeVar("Result")
_here = threading.local()


class _StoppedError(Exception):
    """Nobody wants the work of this thread any more."""


def side_by_side(
    work: Callable[[int], Result],
    layers: Sequence[int],
    geometry: ModelGeometry,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Return what `work` gives for each of `layers`, in their order, done by up to as many threads as torch has.

    Parameters
    ----------
    work
        Called with the number of a layer, with one thread for torch's operations. Where it takes long it should call
        `stop_point` now and then.
    layers
        Numbers of layers.
    geometry
        The model's layers: of wide ones there are fewer at a time.
    on_progress
        Called with (layers done, layers) at the start and after each.

    Raises
    ------
    Exception
        What `work` raises, once the other threads have come to their next `stop_point`.
    """
    threads, stop = torch.get_num_threads(), threading.Event()
    widest = max((layer.num_kv_heads * layer.head_dim for layer in geometry.layers), default=1)
    count = max(1, min(threads, len(layers), MOST_CHANNELS // widest))
    with ThreadPoolExecutor(count, "pqkv-layers", partial(_begin, stop)) as pool:
        futures = [pool.submit(work, layer) for layer in layers]
        try:
            if on_progress is not None:
                on_progress(0, len(layers))
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if on_progress is not None:
                    on_progress(done, len(layers))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a thread that begins later takes the number that was set last
    return [future.result() for future in futures]


def stop_point() -> None:
    """Leave the work of this thread here if it is no longer wanted: after an interruption, or an error in another thread."""
    stop: threading.Event | None = getattr(_here, "stop", None)
    if stop is not None and stop.is_set():
        raise _StoppedError


def _begin(stop: threading.Event) -> None:
    _here.stop = stop
    torch.set_num_threads(1)
