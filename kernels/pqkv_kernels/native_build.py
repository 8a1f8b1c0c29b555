"""Compiles the C++ kernel for this machine, once, and loads it. Knows compilers and folders; no tensors.

The library is kept in the user's cache folder under a name made of its source, the headers beside it, its flags and the
compiler, and is replaced in one step: several processes may build at once.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from pqkv_kernels.errors import KernelError

SOURCE = Path(__file__).with_name("native_attention.cpp")
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
