"""What a generation costs: memory, energy, time of each token. Knows no tasks."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # see proc(5), clear_refs


class Peak:
    """Highest number of bytes, filled in when the block ends: allocated on the GPU, or resident in the process; or None."""

    num_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block; on a CPU it counts the whole process, model included."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    can_reset = False
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        can_reset = True
    yield peak
    if can_reset:
        peak.num_bytes = _resident_peak()


def _resident_peak() -> int | None:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
        return int(found[1]) * 1024 if found else None
    return None


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


class GenerationWatch(LogitsProcessor):
    """Sees the logits of every step and changes none.

    Attributes
    ----------
    broken
        Rows [B] bool whose logits were not finite.
    ticks
        Seconds: when it began, then when the logits of each token were there.
    """

    def __init__(self, num_rows: int, device: torch.device, meter: EnergyMeter | str) -> None:
        self.broken = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._device, self._meter, self._num_rows = device, meter, num_rows
        self._joules = [] if isinstance(meter, str) else [meter.joules()]
        self.ticks = [time.perf_counter()]
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    @property
    def processors(self) -> LogitsProcessorList:
        """What ``generate`` takes as its ``logits_processor``."""
        return LogitsProcessorList([self])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the `scores` [B, V] of the next token, or [B * beams, V], and return them."""
        # Minus infinity is how other processors forbid a token.
        self.broken |= (scores.isnan() | scores.isposinf()).reshape(len(self.broken), -1).any(-1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ticks.append(time.perf_counter())
        if not isinstance(self._meter, str):
            self._joules = [*self._joules[:2], self._meter.joules()]
        return scores

    @property
    def energy(self) -> Energy:
        """What answering took, by the device's own count."""
        if isinstance(self._meter, str):
            return Energy(reason=self._meter)
        if len(self._joules) < 2:
            return Energy(reason="nothing was answered")
        start, first, last = self._joules[0], self._joules[1], self._joules[-1]
        return Energy(first - start, last - first, self._num_rows * (len(self.ticks) - 2))

    def cost(self) -> dict[str, Any]:
        """Return what one batch cost: ms until its first token and for each further one, peak bytes, seconds, joules."""
        steps = [1000 * (after - before) for before, after in zip(self.ticks, self.ticks[1:], strict=False)]
        return {
            "prefill_ms": steps[0] if steps else None,
            "step_ms": [round(ms, 3) for ms in steps[1:]],
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "energy": asdict(self.energy),
        }


@contextmanager
def watching(num_rows: int, device: torch.device) -> Iterator[GenerationWatch]:
    """Yield a watch for one call of ``generate`` over `num_rows` rows; its seconds and peak are known at the end."""
    with energy_meter(device) as meter, peak_memory(device) as peak:
        watch = GenerationWatch(num_rows, device, meter)
        yield watch
    watch.peak_bytes = peak.num_bytes
    watch.seconds = time.perf_counter() - watch.ticks[0]
