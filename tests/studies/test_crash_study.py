"""Four points of the crash study (all of it: ``make crash-study``), and that its instruments do what they say."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import in_child, with_other_clock
from crash_study import Point, Trial, _differences, _stages_of, document
from fatal import Operation, Watch

from pqkv_cli.files import write_text


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    words = ["--points", "4", "--signals", "0", "--seed", "2", "--record", str(tmp_path / "record.md")]
    done = subprocess.run(
        [sys.executable, str(here / "crash_study.py"), *words],
        env={**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "4 of 4 ended with the same bytes" in done.stderr) == (0, True), done.stderr
    assert "| SIGKILL | 4 | 4 |" in (tmp_path / "record.md").read_text()


@pytest.mark.parametrize(
    ("index", "before", "after"),
    [(0, "old", []), (1, "old", [3]), (2, "old", [6]), (3, "old", [6]), (4, "new ds", [])],
)
def test_a_process_ends_at_each_operation_of_a_write(index: int, before: str, after: list[int], tmp_path: Path) -> None:
    """Create, write, sync, rename, sync of the directory: what stands there, and how much of a temporary file is left."""
    folder = tmp_path / "run"
    write_text(folder / "file", "old")

    def act() -> int:
        Watch(folder, index + 1)  # after the directory that is there already
        write_text(folder / "file", "new ds")
        return 0

    assert in_child(act, tmp_path / "log").code == -signal.SIGKILL
    assert (folder / "file").read_text() == before
    assert [path.stat().st_size for path in folder.glob(".*.tmp")] == after


def test_stages_are_told_by_their_records() -> None:
    begins_and_ends = Operation("rename", ".stages.json.tmp")
    operations = [Operation("create", "a"), *[begins_and_ends, Operation("write", "b"), begins_and_ends] * 4]
    wanted = ["calibrate"] * 4 + ["fit-codebooks"] * 3 + ["export"] * 3 + ["eval"] * 3
    assert _stages_of(operations) == wanted


def test_differences_are_faults_and_stand_in_the_record(tmp_path: Path) -> None:
    faults = _differences({"same": b"1", "other": b"1", "left.tmp": b""}, {"same": b"1", "other": b"2", "gone": b""})
    assert faults == ["gone is missing", "left.tmp is surplus", "other is other"]
    trial = Trial(Point(signal.SIGKILL, share=0.5), "eval", "", False, tuple(faults))

    class Made:
        operations = (Operation("create", "a"),)
        allocation = "uniform"

    record = document(Made(), [trial], 0)  # type: ignore[arg-type]
    assert "| SIGKILL | 1 | 0 |" in record and "gone is missing; left.tmp is surplus" in record


def test_clocks_and_dates_are_changed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    moments = [(tmp_path / "file").stat().st_mtime, 0.0]

    def act() -> int:
        import time

        return int(abs(time.time() - moments[0]) > 3600)

    assert in_child(with_other_clock(act, tmp_path, random.Random(0)), tmp_path / "log").code == 1
    assert abs((tmp_path / "file").stat().st_mtime - moments[0]) > 3600
