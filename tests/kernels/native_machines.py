"""C++ as it is built for processors of other kinds, where this one can run it."""

import ctypes
from pathlib import Path

import pytest

from pqkv_kernels.cpu import build as native_build

MACHINES = ("DEFAULT", "AVX2", "AVX512", "AVX512_VBMI")


def library_of(source: Path, machine: str, *flags: str) -> ctypes.CDLL:
    """The library of `source` as it is built for `machine`, with more `flags`; skips where this machine cannot run it."""
    found = native_build.machine()
    if MACHINES.index(found if found in MACHINES else "DEFAULT") < MACHINES.index(machine):
        pytest.skip(f"this machine does not run programs for {machine}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "machine", lambda: machine)
        patch.setattr(native_build, "_FLAGS", (*native_build._FLAGS, *flags))
        return native_build.native_library.__wrapped__(source)
