"""Runs shares of one job of C++ on threads: torch's own where they can be had. Knows nothing of what is computed."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pqkv_kernels.native_build import found_library

SOURCE = Path(__file__).with_name("native_shares.cpp")
_SHARES_PER_THREAD = 4  # so that threads which others hold up leave work to the rest


def in_shares(work: Any, job: ctypes.Structure, count: int, most: int | None = None) -> None:
    """Call the C function ``int work(const Job* job, int64_t begin, int64_t end)`` for equal shares of ``0 .. count``.

    It runs on as many threads as torch uses, at most `most`, and must return 0.
    """
    threads = max(1, min(torch.get_num_threads(), count, count if most is None else most))
    if threads == 1:
        failed = work(ctypes.byref(job), ctypes.c_int64(0), ctypes.c_int64(count))
    elif (shared := _shared_threads()) is not None:
        function = ctypes.cast(work, ctypes.c_void_p)
        shares = ctypes.c_int64(min(count, threads * _SHARES_PER_THREAD))
        failed = shared(function, ctypes.byref(job), ctypes.c_int64(count), shares, ctypes.c_uint(threads))
    else:
        failed = _on_own_threads(work, job, count, threads)
    assert not failed, f"the C++ function refused its work ({failed}); its caller knows what it serves"


@lru_cache
def _shared_threads() -> Any | None:
    """Return what runs shares on torch's threads, None where torch has none of OpenMP's or nothing can be compiled."""
    try:
        library = found_library(SOURCE)
    except OSError:  # the runtime's function was not found
        return None
    return None if library is None else library.pqkv_shares


def _on_own_threads(work: Any, job: ctypes.Structure, count: int, threads: int) -> bool:
    cuts = [count * i // threads for i in range(threads + 1)]
    shares = [(ctypes.c_int64(begin), ctypes.c_int64(end)) for begin, end in zip(cuts, cuts[1:], strict=False)]
    # The others start before this thread does its own share.
    others = _pool(threads - 1).map(lambda share: work(ctypes.byref(job), *share), shares[1:])
    return any([work(ctypes.byref(job), *shares[0]), *others])


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pqkv")
