"""Calibration and fitting shared by the processes of a launcher: two real ones, joined by gloo."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pqkv_cli.calibration.ranks import Ranks
from pqkv_cli.cli.processes import joined_processes, without_json
from pqkv_cli.errors import RunError, UsageError

# Both verbs in one process each, as two calls of the command would be: importing torch takes longer than the work.
SCRIPT = """
import json, os, sys
from pqkv_cli.cli.main import main
for port, line in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    assert main(line) == 0
"""


def environment(rank: int) -> Mapping[str, str]:
    launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    return {**os.environ, **{name: str(value) for name, value in launched.items()}, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(*lines: list[str], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run the command `lines` one after the other in two processes."""
    work = json.dumps([(free_port(), line) for line in lines])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, work],
            env=environment(rank),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def calibrate_words(model: Path, text: Path, run: Path) -> list[str]:
    sizes = ["--samples", "12", "--seq-len", "64", "--batch-size", "2", "--reservoir-size", "400"]
    return ["calibrate", str(model), "-o", str(run), "--data", str(text), "--fisher", *sizes]


def test_two_processes_calibrate_and_fit_as_one(
    pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    fit = ["--bits", "2", "--iterations", "2", "--prototype-bits", "0"]
    assert pqkv(*calibrate_words(tiny_model, texts[0], alone)).code == 0
    calibrate = [*calibrate_words(tiny_model, texts[0], shared), "--json", str(tmp_path / "c.json")]
    first, second = launched(calibrate, calibrate[:-2], ["fit-codebooks", str(shared), *fit], cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == "" and json.loads((tmp_path / "c.json").read_text())["facts"]["windows"] == 12
    assert first.stderr.count("calibrate: 100") <= 1 and "fit-codebooks" in first.stdout
    for layer in range(2):
        one, two = (load_file(run / "calibration" / f"layer-{layer:03d}.safetensors") for run in (alone, shared))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            if tensor.dtype == torch.float64:  # sums in another order
                torch.testing.assert_close(two[name], tensor, rtol=1e-12, atol=1e-12)
            elif name in ("key_weight", "value_weight"):  # solved from such sums
                torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(two[name], tensor), name
        assert {"key_fisher", "value_fisher", "key_weight", "value_weight"} <= one.keys()
    positions = [load_file(run / "calibration" / "windows.safetensors")["positions"] for run in (alone, shared)]
    assert torch.equal(*positions)
    manifests = [json.loads((run / "calibration" / "manifest.json").read_text()) for run in (alone, shared)]
    assert manifests[0] == manifests[1]
    assert list((shared / "calibration").glob("parts*")) == []
    # Moments that differ in their last bit may be fitted to other last bits: fitted here from the same ones.
    again = tmp_path / "again"
    shutil.copytree(shared, again)
    shutil.rmtree(again / "codebooks")
    assert pqkv("fit-codebooks", again, *fit).code == 0
    for layer in range(2):
        fitted = [(run / "codebooks" / f"layer_{layer:03d}.safetensors").read_bytes() for run in (shared, again)]
        assert fitted[0] == fitted[1]


def test_windows_are_dealt_in_whole_batches() -> None:
    for num_windows, batch_size, size in ((7, 2, 2), (8, 4, 2), (100, 8, 3), (3, 1, 3)):
        shares = [Ranks(rank, size).share(num_windows, batch_size) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(num_windows))
        assert all(share.start % batch_size == 0 and len(share) for share in shares)
    with pytest.raises(RunError, match="3 processes for 2 batches of 4 windows.*start at most 2 processes"):
        Ranks(0, 3).share(8, 4)


def test_one_process_gives_back_what_it_is_given() -> None:
    alone, tensors = Ranks(), {"a": torch.ones(2, 3)}
    assert alone.broadcast("x") == "x"
    assert alone.reduce_sum(tensors) is tensors and alone.gather(tensors, {0: 3}) is tensors
    alone.barrier()


def test_other_verbs_refuse_a_launcher() -> None:
    words = ["eval", "my-run"]
    refused = pytest.raises(UsageError, match="eval was started in 2 processes; expected one: call it without a launcher")
    with refused, joined_processes(words, environment(0)):
        pass
    incomplete = {"WORLD_SIZE": "2"}  # a cluster's habit: nobody has launched anything
    with joined_processes(words, incomplete) as own:
        assert own == words


def test_only_the_first_process_writes_json() -> None:
    assert without_json(["calibrate", "m", "--json", "-", "--seed", "1"]) == ["calibrate", "m", "--seed", "1"]
    assert without_json(["calibrate", "--json=x", "m"]) == ["calibrate", "m"]
