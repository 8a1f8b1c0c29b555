"""Measured kernel configurations are used on the device they were measured on, and nowhere else."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pqkv_cli.benchmarks.tune import tune_artifact, write_tuned
from pqkv_cli.errors import ArtifactError, RunError
from pqkv_cli.runtime import Artifact
from pqkv_cli.runtime.tuned import kernels_file, read_tuned, tables_format, use_tuned
from pqkv_kernels.gpu.config import DecodeConfig, config_of, use_config


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, label: str) -> Any:
        return nullcontext(lambda done, total: None)


GPU = "NVIDIA Fake 9 (80GB)"


def measure(keys: Any, values: Any, group: int) -> Any:
    assert group >= 1 and keys.num_heads == values.num_heads
    return lambda config: (1e-3, float(config.num_warps + config.max_registers))


def test_winners_are_written_and_read_for_their_device(artifact: Artifact, tmp_path: Path) -> None:
    tuned = write_tuned(artifact, tmp_path, GPU, measure, {"torch": "x"}, Silent())
    assert tuned.path == tmp_path / "kernels.nvidia-fake-9-80gb.json"
    document = json.loads(tuned.path.read_text())
    assert document["device"] == GPU and len(document["formats"][0]["tried"]) > 10
    found = read_tuned(tmp_path, GPU)
    assert found == tuned.winners
    assert {(config.num_warps, config.max_registers) for config in found.values()} == {(1, 0)}
    assert read_tuned(tmp_path, "NVIDIA Other") == {}
    tuned.path.write_text(json.dumps(document | {"device": "NVIDIA Fake 9 80GB"}))  # another device of the same file name
    assert read_tuned(tmp_path, GPU) == {}


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": "pqkv.kernels/2"}', json.dumps({"schema": "pqkv.kernels/1", "device": GPU})):
        kernels_file(tmp_path, GPU).write_text(text)
        with pytest.raises(ArtifactError, match="kernels.nvidia-fake-9-80gb.json is unreadable .*delete it, or tune again"):
            read_tuned(tmp_path, GPU)


def test_tables_of_bytes_of_an_older_version_are_refused_in_words(artifact: Artifact, tmp_path: Path) -> None:
    tuned = write_tuned(artifact, tmp_path, GPU, measure, {}, Silent())
    tuned.path.write_text(tuned.path.read_text().replace('"float16"', '"int8"'))
    with pytest.raises(ArtifactError, match="tables are 'int8', which this version no longer has.*delete it, or tune again"):
        read_tuned(tmp_path, GPU)


def test_the_loader_gives_them_to_the_keys_of_their_format(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeCuda:
        type = "cuda"

    tables = [None if t is None else {side: replace(t[side]) for side in t} for t in artifact.tables]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr("pqkv_kernels.format.tables.CodecTables.to", lambda self, device: self)
    assert use_tuned(tables, tmp_path, FakeCuda()) is None  # type: ignore[arg-type]
    tuned = write_tuned(artifact, tmp_path, GPU, measure, {}, Silent())
    assert use_tuned(tables, tmp_path, FakeCuda()) == tuned.path.name  # type: ignore[arg-type]
    for layer in tables:
        if layer is not None:
            assert layer["keys"].derived["decode_config"] == tuned.winners[tables_format(layer)]
    assert use_tuned(tables, tmp_path, torch.device("cpu")) is None


def test_a_measured_configuration_is_the_one_that_runs(artifact: Artifact) -> None:
    tables = next(replace(t["keys"]) for t in artifact.tables if t is not None)
    config = DecodeConfig(num_warps=2)
    use_config(tables, config)
    assert config_of(tables) is config


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="torch finds none here; leave it out .* or run `pqkv export RUN --tune`"):
        tune_artifact(tmp_path, Silent())
    assert not list(tmp_path.iterdir())
