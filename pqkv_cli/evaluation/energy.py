"""Energy that a device uses while it answers, where it counts it: NVIDIA GPUs, through NVML. Knows no tasks.

Needs the package ``nvidia-ml-py`` (``pip install nvidia-ml-py``); where something is missing there is a reason instead of a
number. GPUs since Volta count energy themselves; of others the power is sampled and summed up.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

_PERIOD_S = 0.02
INSTALL = "pip install nvidia-ml-py"


class EnergyMeter(Protocol):
    """Something that counts energy."""

    def joules(self) -> float:
        """Return the energy used since a moment that stays the same."""
        ...


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy of answering one batch, in joules: until the first token, and from there to the last of `num_tokens` more.

    Both are None, with the `reason`, where nothing was measured.
    """

    prefill: float | None = None
    decode: float | None = None
    num_tokens: int = 0
    reason: str | None = None


@contextmanager
def energy_meter(device: torch.device) -> Iterator[EnergyMeter | str]:
    """Yield a meter of `device`, or the reason why there is none."""
    if device.type != "cuda":
        yield f"the device is {device.type}; energy is read from NVIDIA GPUs"
        return
    try:
        nvml = import_module("pynvml")
    except ImportError:
        yield f"NVML's Python bindings are not installed: {INSTALL}"
        return
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, device)
    except nvml.NVMLError as error:
        yield f"NVML cannot be asked about this GPU: {error}"
        return
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        with _sampled(nvml, handle) as meter:
            yield meter
        return
    yield _Counter(nvml, handle)


def _handle(nvml: Any, device: torch.device) -> Any:
    # By its own name: the numbers of CUDA and of NVML differ where some GPUs are hidden.
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class _Counter:
    """The GPU's own count, which it keeps in millijoules."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


class _Sampler:
    """The integral of power samples (milliwatts), by the trapezoidal rule."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._lock = threading.Lock()
        self._total = 0.0
        self._last = time.perf_counter(), self._watts()

    def joules(self) -> float:
        with self._lock:
            now, watts = time.perf_counter(), self._watts()
            self._total += (now - self._last[0]) * (watts + self._last[1]) / 2
            self._last = now, watts
            return self._total

    def _watts(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000


@contextmanager
def _sampled(nvml: Any, handle: Any) -> Iterator[EnergyMeter | str]:
    try:
        sampler = _Sampler(nvml, handle)
    except nvml.NVMLError as error:
        yield f"this GPU tells neither energy nor power: {error}"
        return
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_PERIOD_S):
            sampler.joules()

    thread = threading.Thread(target=sample, daemon=True, name="pqkv-energy")
    thread.start()
    try:
        yield sampler
    finally:
        stop.set()
        thread.join()
