"""Locks of runs: who holds one is named, whoever died holds none, and a place without locks is an error."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from pqkv_cli.errors import RunError
from pqkv_cli.pipeline.lock import locked, locked_task
from pqkv_cli.pipeline.rundir import Run

HOLDER = """
import sys, time
from pathlib import Path
from pqkv_cli.pipeline.lock import locked
from pqkv_cli.pipeline.rundir import Run
with locked(Run(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_holder_is_named_again_and_again(tmp_path: Path) -> None:
    with locked(Run(tmp_path)):
        for _ in range(2):  # whoever asks in vain must not wipe the number away
            with (
                pytest.raises(RunError, match=rf"in use by process {os.getpid()}; wait until it has ended"),
                locked(Run(tmp_path)),
            ):
                pass
    with locked(Run(tmp_path)):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=rf"in use by process {process.pid};"), locked(Run(tmp_path)):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(Run(tmp_path)), locked_task(tmp_path / "results", "perplexity", "all"):
        assert Run(tmp_path).lock_file.read_text() == str(os.getpid())


def test_a_lock_file_that_says_nothing_names_nobody(tmp_path: Path) -> None:
    with locked(Run(tmp_path)):
        Run(tmp_path).lock_file.write_bytes(b"")
        with pytest.raises(RunError, match="in use by process unknown"), locked(Run(tmp_path)):
            pass


def test_a_command_that_wrote_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with locked(Run(tmp_path / "deep" / "run")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_an_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    with (
        pytest.raises(RunError, match=rf"cannot be worked in \({os.strerror(number)}\): a run writes its files there"),
        locked(Run(tmp_path)),
    ):
        pass


def test_the_lock_is_the_kernels(tmp_path: Path) -> None:
    with locked(Run(tmp_path)), pytest.raises(filelock.Timeout):
        filelock.FileLock(Run(tmp_path).lock_file, timeout=0).acquire()
