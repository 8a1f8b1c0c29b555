"""Full disks, read-only directories and unreadable files, at every stage: what is said, what stays, and how it goes on.

Operations are refused within Python, as the kernel refuses them: tests may run as a user whom no permission stops.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Ended, in_child, pqkv
from fatal import Operation, Watch, make_unreadable, refusing
from tiny_run import contents, make_recipe

from pqkv_cli.pipeline.lock import locked, locked_task
from pqkv_cli.pipeline.rundir import Run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing has disturbed, with the operations of its stages beside it; tests must not change it."""
    root = tmp_path_factory.mktemp("whole")
    ended = in_child(pqkv("run", recipe, "-o", root / "run"), root / "log")
    assert ended.code == 0, ended.log
    return root / "run"


def refused(action: Callable[[], int], root: Path, end: Callable[[Operation], None], log: Path) -> Ended:
    """Do `action` where `end` meets every operation below `root`."""

    def act() -> int:
        Watch(root, 0, end, lasts=True)
        return action()

    return in_child(act, log)


@pytest.mark.parametrize("folder", ["calibration", "codebooks", "artifact", "results"])
def test_a_disk_that_is_full_at_a_stage(folder: str, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def full(operation: Operation) -> None:
        # From the first file of the stage on nothing can be written any more.
        full_now.extend([operation] if operation.place.startswith(folder) and operation.kind == "create" else [])
        if full_now:
            refusing(errno.ENOSPC)(operation)

    full_now: list[Operation] = []
    ended = refused(pqkv("run", recipe, "-o", run), run, full, tmp_path / "log")
    assert ended.code == 1, ended.log
    assert "No space left on device" in ended.log and str(run / folder) in ended.log and "free some space" in ended.log
    assert list(run.rglob("*.tmp")) == []
    again = in_child(pqkv("run", recipe, "-o", run), tmp_path / "log")
    assert again.code == 0, again.log
    assert contents(run) == contents(whole)


@pytest.mark.parametrize("verb", ["run", "calibrate", "fit-codebooks", "export"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_directory_that_cannot_be_written(verb: str, number: int, whole: Path, recipe: Path, tmp_path: Path) -> None:
    words = {"run": [recipe, "-o", whole], "calibrate": [recipe, "--samples", 4, "-o", whole]}.get(verb, [whole, "--seed", 1])
    before = contents(whole)
    words = words if verb != "export" else [whole, "--window-tokens", 128]
    ended = refused(pqkv(verb, *words), whole, refusing(number), tmp_path / "log")
    assert (ended.code, "Traceback" in ended.log) == (1, False), ended.log
    assert f"{whole} cannot be worked in ({os.strerror(number)}): " in ended.log
    assert "choose another directory with -o" in ended.log
    assert contents(whole) == before


def test_an_evaluation_that_cannot_be_written(whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    ended = refused(pqkv("eval", whole, "--limit", 1, "--mode", "all"), whole, refusing(errno.EROFS), tmp_path / "log")
    assert (ended.code, "results" in ended.log, "Read-only file system" in ended.log) == (1, True, True), ended.log
    assert contents(whole) == before


@pytest.mark.parametrize("words", [("inspect",), ("verify",), ("diff", "="), ("generate", "once", "--max-new-tokens", 2)])
def test_looking_needs_no_writing(words: tuple, whole: Path, tmp_path: Path) -> None:
    verb, *rest = [whole if word == "=" else word for word in words]
    ended = refused(pqkv(verb, whole, *rest), whole, refusing(errno.EROFS), tmp_path / "log")
    assert ended.code == 0, ended.log


@pytest.mark.parametrize(
    ("name", "verb", "code"),
    [
        ("recipe.yaml", "inspect", 2),
        ("stages.json", "inspect", 1),
        ("stages.json", "run", 1),
        ("calibration/manifest.json", "fit-codebooks", 1),
        ("codebooks/fit.json", "export", 1),
        ("artifact/pqkv.safetensors", "verify", 1),
        ("artifact/recipe.yaml", "generate", 2),
        ("results/perplexity-all.json", "report", 1),
    ],
)
def test_a_file_that_cannot_be_read(name: str, verb: str, code: int, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    words = {
        "run": [recipe, "-o", run],
        "fit-codebooks": [run, "--iterations", 3],
        "export": [run, "--window-tokens", 128],
        "generate": [run / "artifact", "once"],
    }.get(verb, [run])

    def act() -> int:
        make_unreadable(run / name)
        return pqkv(verb, *words)()

    ended = in_child(act, tmp_path / "log")
    assert (ended.code, "Traceback" in ended.log, "unexpected" in ended.log) == (code, False, False), ended.log
    assert str(run / name) in ended.log and "Permission denied" in ended.log


def test_the_texts_that_cannot_be_read(whole: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    for text in ("text", "binary", "missing"):
        ended = in_child(pqkv("calibrate", recipe, "--data", tmp_path / text, "-o", tmp_path / "run"), tmp_path / "log")
        assert (ended.code, "Traceback" in ended.log, "unexpected" in ended.log) == (1, False, False), ended.log
        assert text in ended.log
    assert not (tmp_path / "run").exists()


def test_two_evaluations_of_one_task_at_once(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = contents(run)
    with locked_task(run / "results", "perplexity", "all"):
        busy = in_child(pqkv("eval", run, "--limit", 1, "--mode", "all"), tmp_path / "log")
        other = in_child(pqkv("eval", run, "--limit", 1, "--mode", "cache"), tmp_path / "log")
        assert contents(run)["results/perplexity-all.json"] == before["results/perplexity-all.json"]
    assert (busy.code, f"being measured into {run / 'results'} by process {os.getpid()}" in busy.log) == (1, True), busy.log
    assert other.code == 0, other.log
    assert in_child(pqkv("eval", run, "--limit", 1, "--mode", "all"), tmp_path / "log").code == 0


def test_two_runs_in_one_directory_at_once(whole: Path, recipe: Path, tmp_path: Path) -> None:
    with locked(Run(whole)):
        ended = in_child(pqkv("run", recipe, "-o", whole), tmp_path / "log")
    assert (ended.code, f"{whole} is in use by process {os.getpid()}; wait until it has ended" in ended.log) == (1, True)
