"""Runs shares of one job of C++ on threads: it lets go of Python's lock. Knows nothing of what is computed."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def in_shares(work: Callable[[ctypes.c_int64, ctypes.c_int64], int], count: int, most: int | None = None) -> list[int]:
    """Call ``work(begin, end)`` for equal shares of ``0 .. count``, on as many threads as torch uses, at most `most`.

    Returns
    -------
    list of int
        What the calls returned.
    """
    threads = max(1, min(torch.get_num_threads(), count, count if most is None else most))
    cuts = [count * i // threads for i in range(threads + 1)]
    shares = [(ctypes.c_int64(begin), ctypes.c_int64(end)) for begin, end in zip(cuts, cuts[1:], strict=False)]
    # The others start before this thread does its own share.
    others = _pool(threads - 1).map(lambda share: work(*share), shares[1:]) if threads > 1 else ()
    return [work(*shares[0]), *others]


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pqkv")
