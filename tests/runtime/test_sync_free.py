"""A decode step must not wait for the device: no value of a tensor is asked for on the way."""

import traceback
from typing import Any

import pytest
import torch
from tiny_chain import tokens
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pqkv_cli.cache.async_scalar import AsyncScalar
from pqkv_cli.hf.steps import require
from pqkv_cli.runtime import Artifact, attach
from pqkv_kernels.cpu.build import find_compiler

ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense,
    ATEN.is_nonzero,
    ATEN.nonzero,
    ATEN.equal,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.allclose,
}
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"))]


class Waits(TorchDispatchMode):
    """Notes every operation below our code that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            ours = [f for f in traceback.extract_stack() if "/pqkv_" in f.filename]
            # A requirement is read on the CPU alone (see the test below).
            self.found += [f"{func} below {frame.filename}:{frame.lineno}" for frame in ours[-1:] if frame.name != "require"]
        return func(*args, **(kwargs or {}))


class Landed:
    """What a copy has become on the host."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return bool(self.value)


def read_later(monkeypatch: pytest.MonkeyPatch, clock: list[int]) -> None:
    """Let copies be read only in a later step than the one that made them, as values on the host."""
    made = AsyncScalar.__init__

    def make(self: Any, tensor: torch.Tensor) -> None:
        made(self, tensor)
        self.step = clock[0]

    def read(self: Any) -> Landed:
        assert self.step < clock[0], "a copy is read in the step that started it"
        with _disable_current_modes():
            return Landed(self._host.tolist())

    monkeypatch.setattr(AsyncScalar, "__init__", make)
    monkeypatch.setattr(AsyncScalar, "read", read)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step_asks_for_no_value(model: Any, artifact: Artifact, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = [0], Waits()
    ids = tokens(2, 400)
    with attach(model, artifact, backend=backend) as attached, torch.no_grad():
        read_later(monkeypatch, clock)
        cache = attached.new_cache()
        attached._errors = None
        model(ids[:, :150], past_key_values=cache)
        coded = cache.quantized_layers[0].num_coded
        for at in range(150, 300):
            clock[0] += 1
            with waits:
                model(ids[:, at : at + 1], past_key_values=cache)
        assert cache.quantized_layers[0].num_coded >= coded + 128  # pages were flushed on the way
    assert waits.found == []


def test_the_watch_sees_what_waits() -> None:
    waits = Waits()
    with waits:
        bool(torch.ones(3).all())
    assert waits.found == []  # not below our code
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile("def ask():\n    return torch.ones(3).sum().item()", "/pqkv_cli/made_up.py", "exec"), namespace)
    with waits:
        namespace["ask"]()
    assert len(waits.found) == 1 and "_local_scalar_dense" in waits.found[0]


@torch.no_grad()
def test_pages_are_looked_at_once_and_again_after_a_crop(model: Any, artifact: Artifact) -> None:
    ids = tokens(1, 300)
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        model(ids[:, :200], past_key_values=cache)
        bases = cache.slots._bases
        assert bases.num_pages == 3
        seen = bases.up_to(3)
        for at in range(200, 256):
            model(ids[:, at : at + 1], past_key_values=cache)
        assert bases.num_pages == 4 and torch.equal(bases.up_to(4)[:, :3], seen)
        assert cache.num_bytes().positions >= 256 * 4 + 8 + bases.num_bytes
        cache.crop(-60)
        assert bases.num_pages == 0
        model(ids[:, 196:230], past_key_values=cache)
        assert torch.equal(bases.up_to(3), torch.tensor([[0, 64, 128]]))


def test_a_requirement_on_a_gpu_is_left_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        is_cuda = True

        def all(self) -> str:
            return "all of them"

    asserted: list[Any] = []
    monkeypatch.setattr(torch, "_assert_async", lambda *args: asserted.append(args))
    require(OnDevice(), "message")  # type: ignore[arg-type]
    assert asserted == [("all of them", "message")]
