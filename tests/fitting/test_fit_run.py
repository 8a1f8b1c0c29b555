import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import fitting_support as support
import pytest
import torch

from pqkv_cli.errors import RunError
from pqkv_cli.fitting.record import load_record
from pqkv_cli.fitting.run import fit_codebooks, load_fitted
from pqkv_cli.fitting.settings import FitSettings

FAST = FitSettings(iterations=3)


def fit(directory: Path, store: support.Store | None = None, settings: FitSettings = FAST) -> support.Store:
    store = support.Store() if store is None else store
    fit_codebooks(store, *support.plan(), directory, settings)
    return store


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_fit_and_load(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    record = fit_codebooks(support.Store(), *support.plan(), tmp_path / "a" / "b", FAST, lambda *n: seen.append(n))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    loaded = load_fitted(tmp_path / "a" / "b")
    assert load_record(tmp_path / "a" / "b") == record
    assert record.plan == support.plan()[1]
    assert loaded[1].tables == {}
    tables = loaded[0].tables["keys"]
    assert tables.rotary == support.LAYER.rotary
    assert tables.permutation is not None and tables.permutation.dtype == torch.int16
    assert record.relative_error[0] == loaded[0].relative_error
    assert set(contents(tmp_path / "a" / "b")) == {"fit.json", *(f"layer_00{i}.safetensors" for i in range(3))}


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(tmp_path / name)
    fit(tmp_path / "c", settings=replace(FAST, seed=1))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["layer_000.safetensors"] != contents(tmp_path / "c")["layer_000.safetensors"]


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", support.Store(fail_at=2))
    with pytest.raises(RunError, match="an unfinished fit.*run pqkv fit-codebooks"):
        load_fitted(tmp_path / "killed")
    before = times(tmp_path / "killed")
    fit(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    after = times(tmp_path / "killed")
    assert all(after[name] == before[name] for name in before)


def test_a_layer_that_stays_dense_is_not_asked_for(tmp_path: Path) -> None:
    assert fit(tmp_path).asked == [0, 2]


@pytest.mark.parametrize("change", ["settings", "samples"])
def test_another_request_is_fitted_again(tmp_path: Path, change: str) -> None:
    fit(tmp_path)
    before = contents(tmp_path)
    if change == "settings":
        fit(tmp_path, settings=replace(FAST, damping=0.5))
    else:
        fit(tmp_path, support.Store(seed=1))
    assert all(
        contents(tmp_path)[name] != before[name] for name in ("fit.json", "layer_000.safetensors", "layer_002.safetensors")
    )


def test_a_changed_fit_is_not_finished_until_it_is(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, support.Store(seed=1, fail_at=2))
    with pytest.raises(RunError, match="unfinished"):
        load_fitted(tmp_path)


def test_fewer_layers_leave_no_files_behind(tmp_path: Path) -> None:
    fit(tmp_path)
    fit_codebooks(support.Store(), *support.plan(1, None), tmp_path, FAST)
    assert set(contents(tmp_path)) == {"fit.json", "layer_000.safetensors"}


def test_missing_and_damaged_fits_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no fitted codebooks"):
        load_fitted(tmp_path)
    fit(tmp_path)
    layer, record = tmp_path / "layer_002.safetensors", tmp_path / "fit.json"
    whole, text = layer.read_bytes(), record.read_text()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for bad in (whole[:-5], b"", bytes(flipped)):
        layer.write_bytes(bad)
        with pytest.raises(RunError, match=r"layer_002.safetensors is damaged .*run pqkv fit-codebooks"):
            load_fitted(tmp_path)
    layer.unlink()
    with pytest.raises(RunError, match=r"layer_002.safetensors is missing"):
        load_fitted(tmp_path)
    layer.write_bytes((tmp_path / "layer_000.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"has hash .*expected .*the one in fit.json"):
        load_fitted(tmp_path)
    for bad, message in (("{", "cannot be read"), ("[]", "schema 'list'"), (json.dumps({"schema": "pqkv.fit/1"}), "damaged")):
        record.write_text(bad)
        with pytest.raises(RunError, match=message):
            load_fitted(tmp_path)
    fit(tmp_path)
    assert (layer.read_bytes(), record.read_text()) == (whole, text)


def test_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device.*free some space"):
        fit(tmp_path)
    assert contents(tmp_path) == {}


def test_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    geometry, _ = support.plan(2, None)
    with pytest.raises(RunError, match="the plan has 3 layers, the model 2"):
        fit_codebooks(support.Store(), geometry, support.plan()[1], tmp_path, FAST)
