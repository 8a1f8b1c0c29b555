"""Energy per token: from the GPU's count, from power samples, or a reason why not. The GPU is a fake one."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chain import tokens

from pqkv_cli.evaluation import costs as module
from pqkv_cli.evaluation.costs import EnergyMeter, energy_meter
from pqkv_cli.evaluation.generation import Question
from pqkv_cli.evaluation.qa_runner import ask
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject

Maker = Callable[..., Subject]
GPU = torch.device("cuda", 0)


class NVMLError(Exception):
    """What pynvml raises."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, counts: bool = True, powers: bool = True, starts: bool = True) -> Any:
    state = SimpleNamespace(millijoules=5000)

    def asked(allowed: bool, value: Callable[[], int]) -> Callable[..., int]:
        def answer(*_: Any) -> int:
            if not allowed:
                raise NVMLError("Not Supported")
            return value()

        return answer

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=asked(starts, lambda: 0),
        nvmlDeviceGetTotalEnergyConsumption=asked(counts, lambda: state.millijoules),
        nvmlDeviceGetPowerUsage=asked(powers, lambda: 250_000),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(module, "_handle", lambda nvml, device: "handle")
    return state


def test_the_count_of_the_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fake_nvml(monkeypatch)
    with energy_meter(GPU) as meter:
        assert not isinstance(meter, str)
        before = meter.joules()
        state.millijoules += 1500
        assert meter.joules() - before == pytest.approx(1.5)


def test_else_power_is_summed_up_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, counts=False)
    with energy_meter(GPU) as meter:
        assert not isinstance(meter, str)
        before, started = meter.joules(), time.perf_counter()
        time.sleep(0.06)
        found, elapsed = meter.joules() - before, time.perf_counter() - started
        assert found == pytest.approx(250 * elapsed, rel=0.2)


@pytest.mark.parametrize(
    ("device", "missing", "reason"),
    [
        (torch.device("cpu"), {}, "the device is cpu; energy is read from NVIDIA GPUs"),
        (GPU, {"counts": False, "powers": False}, "this GPU tells neither energy nor power: Not Supported"),
        (GPU, {"starts": False}, "NVML cannot be asked about this GPU: Not Supported"),
    ],
)
def test_there_is_a_reason_where_nothing_counts(
    device: torch.device, missing: dict[str, bool], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml(monkeypatch, **missing)
    with energy_meter(device) as meter:
        assert meter == reason


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with energy_meter(GPU) as meter:
        assert meter == "NVML's Python bindings are not installed: pip install nvidia-ml-py"


def questions() -> list[Question]:
    return [Question(f"q{i}", tokens(40, seed=i), 5) for i in range(3)]


def asked(subject: Subject) -> dict[str, Any]:
    settings = EvaluationSettings("cache", context=64)
    found = ask(subject, settings, questions(), lambda question, text: 1.0, lambda done, total: None)
    return dict(found.cost["energy"])


def test_a_record_has_joules_per_token_of_a_row(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ticking:
        """Uses 6 J from each reading to the next."""

        def __init__(self) -> None:
            self.total = 100.0

        def joules(self) -> float:
            self.total += 6
            return self.total

    @contextmanager
    def ticking(device: torch.device) -> Iterator[EnergyMeter]:
        yield Ticking()

    monkeypatch.setattr("pqkv_cli.evaluation.costs.energy_meter", ticking)
    found = asked(subject())
    for side in ("baseline", "quantized"):
        # One reading per step of three rows: 6 J each.
        assert found[side] == {"prefill_joules": 6.0, "joules_per_token": 2.0, "reason": None}


def test_a_record_of_a_cpu_says_why_it_has_none(subject: Maker) -> None:
    found = asked(subject())
    assert found["quantized"]["joules_per_token"] is None
    assert found["baseline"]["reason"] == "the device is cpu; energy is read from NVIDIA GPUs"
