"""Calibrations that were killed, finished, or made with other settings: the same bytes, nothing twice, nothing mixed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import quiet

from pqkv_cli.calibration import collect as settings_module
from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.errors import RunError


def stored_bytes(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [0, 2, 4, 6, 7])
def test_resuming_gives_the_same_bytes(
    random_model: Any,
    settings: CollectSettings,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
) -> None:
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    model = random_model()
    calls: list[tuple[int, int]] = []
    collect(model, windows, tmp_path / "whole", settings, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]

    def killer(done: int, total: int) -> None:
        if done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        collect(model, windows, tmp_path / "resumed", settings, killer)
    with pytest.raises(RunError, match="half-finished"):
        CalibrationStore(tmp_path / "resumed")
    resumed: list[int] = []
    collect(model, windows, tmp_path / "resumed", settings, lambda done, total: resumed.append(done))
    assert resumed[0] == kill_at
    assert stored_bytes(tmp_path / "resumed") == stored_bytes(tmp_path / "whole")


def test_parts_do_not_change_the_result(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    collect(model, windows, tmp_path / "one", settings, quiet)
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    collect(model, windows, tmp_path / "many", settings, quiet)
    assert stored_bytes(tmp_path / "one") == stored_bytes(tmp_path / "many")


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, finished: bool
) -> None:
    model = random_model()

    def stop(done: int, total: int) -> None:
        if not finished:
            raise Killed

    try:
        collect(model, windows, tmp_path, settings, stop)
    except Killed:
        assert not finished
    before = stored_bytes(tmp_path)
    other = dataclasses.replace(settings, seed=1, reservoir_size=50)
    with pytest.raises(RunError, match=r"reservoir_size was 60, now 50; settings\.seed was 0, now 1.*delete this one"):
        collect(model, windows, tmp_path, other, quiet)
    with pytest.raises(RunError, match="windows_sha256"):
        collect(model, windows + 1, tmp_path, settings, quiet)
    with torch.no_grad():
        changed = random_model()
        changed.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(RunError, match=r"model\.weights_sha256"):
        collect(changed, windows, tmp_path, settings, quiet)
    assert stored_bytes(tmp_path) == before


def test_a_finished_calibration_is_left_alone(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model()
    collect(model, windows, tmp_path, settings, quiet)
    model.forward = model.model.forward = None  # not called again
    calls: list[int] = []
    collect(model, windows, tmp_path, settings, lambda done, total: calls.append(done))
    assert calls == [7]


def test_no_observer_tensor_grows_with_the_text(
    random_model: Any, windows: torch.Tensor, settings: CollectSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held between batches is the sum per layer: part files never hold more than the reservoir."""
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    sizes: list[int] = []

    def watch(done: int, total: int) -> None:
        parts = list((tmp_path / "parts").glob("moments-*"))
        assert len(parts) <= 1
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "parts").glob("samples-*")))

    long = windows.repeat(8, 1)
    collect(random_model(), long, tmp_path, dataclasses.replace(settings, num_samples=64), watch)
    per_token = 2 * 2 * (16 * 2 * 2 + 4)  # layers, heads, keys and values in fp16, mass
    assert sizes[-1] <= 60 * per_token + 28 * 2000
