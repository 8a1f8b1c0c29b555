"""Records of a run in which something was changed: refused in words. All of what the mutation study has found, kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.errors import RunError
from pqkv_cli.fitting.run import load_fitted

Change = Callable[[dict[str, Any]], object]


def change(path: Path, what: Change) -> None:
    document = json.loads(path.read_text())
    what(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda d: d["plan"]["layers"][0].update(keys="none"), "KeyError"),
        (lambda d: d["plan"]["layers"][1].update(keys=""), "KeyError"),
        (lambda d: d["plan"]["layers"][0].update(values=["v4"]), "layer 0 is not described by names"),
        (lambda d: d["plan"]["layers"][0].update(dense_reason=None), "layer 0 is not described by names"),
        (lambda d: d["plan"]["layers"].pop(), "it tells of 1 and of 2 layers"),
        (lambda d: d["layers_sha256"].append("0" * 64), "it tells of 2 and of 3 layers"),
        (lambda d: d.update(relative_error=[]), "it tells of 0 and of 2 layers"),
        (lambda d: d["plan"].pop("codecs"), "KeyError"),
        (lambda d: d.update(settings=[1]), "TypeError"),
    ],
)
def test_a_fit(what: Change, reason: str, exported: Path, tmp_path: Path) -> None:
    codebooks = Path(shutil.copytree(exported / "codebooks", tmp_path / "codebooks"))
    change(codebooks / "fit.json", what)
    with pytest.raises(RunError, match="fit.json is damaged .*expected a complete record; run pqkv fit-codebooks") as caught:
        load_fitted(codebooks)
    assert reason in str(caught.value)


@pytest.mark.parametrize("layers", [None, -1, "two", [1, 2], [None]])
def test_a_calibration(layers: object, exported: Path, tmp_path: Path) -> None:
    calibration = Path(shutil.copytree(exported / "calibration", tmp_path / "calibration"))
    change(calibration / "manifest.json", lambda d: d.update(layers=layers))
    with pytest.raises(RunError, match="manifest.json is damaged .*and calibrate again"):
        CalibrationStore(calibration)


@pytest.mark.parametrize("name", ["codebooks/fit.json", "calibration/manifest.json"])
def test_json_without_an_end(name: str, exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    (run / name).write_text("[" * 100_000)
    with pytest.raises(RunError, match="cannot be read"):
        load_fitted(run / "codebooks") if "fit" in name else CalibrationStore(run / "calibration")


@pytest.mark.parametrize("name", ["layer_001.safetensors", "fit.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_fit_is_mended_by_the_command_that_the_error_names(
    name: str, cut: bool, pqkv: Callable, exported: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    files = {path.name: path.read_bytes() for path in (run / "codebooks").iterdir()}
    shutil.rmtree(run / "artifact")
    damaged = run / "codebooks" / name
    if cut:
        damaged.write_bytes(files[name][:-9])
    else:
        damaged.unlink()
    refused = pqkv("export", run)
    assert refused.code == 1 and "run pqkv fit-codebooks on this run" in refused.err
    mended = pqkv("fit-codebooks", run)
    assert mended.code == 0 and "was done with these settings, but" in mended.err and "going on where it stopped" in mended.err
    assert {path.name: path.read_bytes() for path in (run / "codebooks").iterdir()} == files
    assert pqkv("export", run).code == 0
    assert "already done" in pqkv("fit-codebooks", run).err


def test_a_damaged_artifact_is_exported_anew(pqkv: Callable, exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    artifact = next((run / "artifact").glob("*.safetensors"))
    whole = artifact.read_bytes()
    artifact.write_bytes(whole[:-100] + b"\0" * 100)
    assert "was done with these settings, but" in pqkv("export", run).err
    assert artifact.read_bytes() == whole
