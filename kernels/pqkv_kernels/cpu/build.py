"""Compiles the C++ kernels for this machine, once, loads them, and runs shares of one job on threads. No tensors."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pqkv_kernels.errors import KernelError

SOURCE = Path(__file__).parent / "src" / "attention.cpp"
CACHE = Path("~/.cache/pqkv")
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_MACHINE_FLAGS = {"AVX2": _AVX2, "AVX512": _AVX512, "AVX512_VBMI": (*_AVX512, "-mavx512vbmi")}
_PROCESSOR = Path("/proc/cpuinfo")  # of Linux
_MOST_SECONDS = 300


def native_obstacle() -> str | None:
    """Return why the C++ kernel cannot run on this machine, or None; builds it if it has not been built."""
    try:
        native_library()
    except KernelError as error:
        return str(error)
    return None


@lru_cache
def native_library(source: Path = SOURCE) -> ctypes.CDLL:
    """Return the compiled kernel of `source`; the first call on a machine takes some seconds.

    Raises
    ------
    KernelError
        If there is no compiler or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(f"no C++ compiler was found ({', '.join(_COMPILERS)}); install one")
    command = [compiler, *_FLAGS, *_MACHINE_FLAGS.get(machine(), ())]
    headers = b"".join(header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    built_from = "\n".join([*command, platform.machine()]).encode() + headers + source.read_bytes()
    key = hashlib.sha256(built_from).hexdigest()[:20]
    target = CACHE.expanduser() / f"{source.stem}-{key}.so"
    if target.is_file():
        return ctypes.CDLL(str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = _compiled(command, source, Path(folder))
            os.replace(built, target)
        return ctypes.CDLL(str(target))
    except OSError:
        # The user's folder cannot be written or runs no programs: a private one serves this process.
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_compiled(command, source, Path(folder))))


@lru_cache
def found_library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled kernel of `source`, None where this machine cannot build it; asked once."""
    try:
        return native_library(source)
    except KernelError:
        return None


@lru_cache
def machine() -> str:
    """Return what this processor runs: what torch itself found, ``AVX512_VBMI`` where it looks up bytes in vectors, too."""
    found: str = torch.backends.cpu.get_cpu_capability()
    looks_up = found == "AVX512" and _PROCESSOR.is_file() and "avx512vbmi" in _PROCESSOR.read_text().split()
    return "AVX512_VBMI" if looks_up else found


def find_compiler() -> str | None:
    """Return the first C++ compiler on the search path."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _compiled(command: list[str], source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.so"
    try:
        done = subprocess.run(
            [*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False, timeout=_MOST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{command[0]} did not finish within {_MOST_SECONDS} seconds") from error
    if done.returncode:
        raise KernelError(f"{command[0]} cannot compile {source.name}: {done.stderr.strip()[-500:] or 'no message'}")
    return target


SHARES_SOURCE = Path(__file__).parent / "src" / "shares.cpp"
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
        library = found_library(SHARES_SOURCE)
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
