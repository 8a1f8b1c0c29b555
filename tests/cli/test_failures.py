"""Interruptions, full disks and other failures: clean exit, nothing half-written, and the run goes on afterwards."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pqkv_cli.cli.main import Terminated, describe
from pqkv_cli.errors import ArtifactError, GateError, RunError, UsageError
from pqkv_cli.pipeline.lock import locked
from pqkv_cli.pipeline.rundir import Run


@pytest.fixture
def long_line(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """Return a calibration of several seconds."""
    data = tmp_path / "long.txt"
    data.write_text(texts[0].read_text() * 40, encoding="utf-8")
    options = ["--data", data, "--samples", 250, "--seq-len", 64, "--reservoir-size", 2000, "-o", tmp_path / "RUN"]
    return ["calibrate", *map(str, [tiny_model, *options])]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on(number: signal.Signals, code: int, long_line: list[str], pqkv: Callable, tmp_path: Path) -> None:
    # A job in the background of a shell inherits an ignored SIGINT; what is tested is the answer to one that arrives.
    process = subprocess.Popen(
        [sys.executable, "-m", "pqkv_cli", *long_line],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) and None,
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("RUN/calibration/parts/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "the same command goes on: pqkv calibrate" in err
    assert "Traceback" not in err
    assert list(tmp_path.rglob("*.tmp")) == []
    assert "is unfinished" in pqkv("fit-codebooks", tmp_path / "RUN").err
    again = pqkv(*long_line)
    assert (again.code, "going on where it stopped" in again.err) == (0, True)


def test_one_process_at_a_time(pqkv: Callable, exported: Path) -> None:
    with locked(Run(exported)):
        answer = pqkv("export", exported)
    assert answer.code == 1
    assert f"{exported} is in use by process {os.getpid()}" in answer.err


def test_a_full_disk_leaves_nothing(pqkv: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.json").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = pqkv("recipes", "--json", tmp_path / "out.json")
    assert (answer.code, "the disk is full" in answer.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "old"


def test_a_full_disk_during_export_keeps_the_old_artifact(
    pqkv: Callable, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run = Path(shutil.copytree(exported, tmp_path / "RUN"))
    old = (run / "artifact" / "pqkv.safetensors").read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    answer = pqkv("export", run, "--window-tokens", 8)
    assert (answer.code, "disk is full" in answer.err) == (1, True)
    assert (run / "artifact" / "pqkv.safetensors").read_bytes() == old
    assert list(run.rglob("*.tmp")) == []
    monkeypatch.undo()
    assert pqkv("export", run, "--window-tokens", 8).code == 0


class OutOfMemoryError(RuntimeError):
    """Stands for torch's error of the same name."""


@pytest.mark.parametrize(
    ("error", "code", "phrase"),
    [
        (UsageError("wrong word"), 2, "error: wrong word"),
        (RunError("no stage"), 1, "error: no stage"),
        (ArtifactError("bad hash"), 1, "error: bad hash"),
        (GateError("too bad"), 3, "error: too bad"),
        (KeyboardInterrupt(), 130, "interrupted: nothing is half-written"),
        (Terminated(), 143, "terminated: nothing is half-written"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "'/x/y'"),
        (MemoryError(), 1, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried"), 1, "out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory (DefaultCPUAllocator"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero; run again with --debug"),
    ],
)
def test_every_failure_has_a_message_and_a_code(error: BaseException, code: int, phrase: str) -> None:
    message, found = describe(error, ["export", "my run"])
    assert (found, phrase in message) == (code, True), message


def test_a_reader_that_leaves_is_no_error() -> None:
    line = f"{sys.executable} -m pqkv_cli recipes show demo | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
