"""Outlier channels before and after the transform: the numbers, and what the report says of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pqkv_cli.artifact.summary import summarize
from pqkv_cli.calibration.store import CalibrationStore, layer_file
from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.channels import channel_peaks, over_median, pooled
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.report.page import ReportSource, report_page
from pqkv_cli.report.pictures import outlier_channels
from pqkv_kernels.reference.encode import to_code_space

Maker = Callable[..., Subject]


@pytest.fixture
def calibration(subject: Maker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(subject().artifact.path.parent / "calibration", tmp_path / "calibration"))


def test_peaks_are_the_largest_magnitudes_in_both_spaces(subject: Maker, calibration: Path) -> None:
    artifact, store = subject().artifact, CalibrationStore(calibration)
    peaks = channel_peaks(store, artifact)
    assert [(p.layer, p.side) for p in peaks] == [(i, side) for i in range(2) for side in ("keys", "values")]
    samples, tables = store.layer(1), artifact.tables[1]
    assert tables is not None
    assert torch.equal(peaks[2].plain, samples.keys.float().abs().amax(1))
    coded = to_code_space(samples.values[None], tables["values"])[0]
    assert torch.equal(peaks[3].coded, coded.abs().amax(1))


def test_an_outlier_channel_is_seen_and_named(subject: Maker, calibration: Path) -> None:
    artifact = subject().artifact
    file = calibration / layer_file(1)
    tensors = load_file(file)
    before = tensors["keys"].float().abs().amax(1)[0]
    channel = int(before.argmax())
    tensors["keys"][0, 3, channel] = 40 * float(before.median())
    save_file(tensors, file)
    peaks = channel_peaks(CalibrationStore(calibration), artifact)
    seen = over_median(peaks[2].plain)
    assert (int(seen.argmax()), float(seen.max())) == (channel, pytest.approx(40, rel=0.02))
    drawn = outlier_channels(peaks)
    assert [picture.title for picture in drawn] == [
        f"{side} {space}" for side in ("Keys", "Values") for space in ("as the model makes them", "in code space")
    ]
    assert f"The largest peaks at {float(seen.max()):.1f} times the median channel of its head, in layer 1" in drawn[0].note
    text = report_page(ReportSource(artifact.header, summarize(artifact), [], channels=peaks))
    assert "Outlier channels" in text and all(picture.svg in text and picture.note in text for picture in drawn)


def test_a_calibration_of_another_model_is_not_shown(subject: Maker, calibration: Path) -> None:
    store = CalibrationStore(calibration)
    store.manifest["model"]["weights_sha256"] = "f" * 64
    assert channel_peaks(store, subject().artifact) == []
    assert outlier_channels([]) == []


def test_a_damaged_calibration_is_named(subject: Maker, calibration: Path) -> None:
    (calibration / layer_file(0)).write_bytes(b"nothing")
    with pytest.raises(RunError, match=f"{layer_file(0)} is damaged .* and calibrate again"):
        channel_peaks(CalibrationStore(calibration), subject().artifact)


def test_neighbours_are_pooled() -> None:
    assert pooled(torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]), 3) == [3.0, 5.0, 4.0]
    assert len(pooled(torch.arange(128.0), 64)) == 64
