import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.errors import ArtifactError, PqkvError, RunError
from pqkv_cli.files import is_temporary, new_directory, turn, write_bytes, write_text


def fails(number: int) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_content_is_written_as_it_is(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b" / "bytes", b"\0\r\n")
    write_text(tmp_path / "text", "Grüße\r\n")
    write_text(tmp_path / "text", "")
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\0\r\n"
    assert (tmp_path / "text").read_bytes() == b""
    write_text(tmp_path / "text", "Grüße\r\n")
    assert (tmp_path / "text").read_bytes() == b"Gr\xc3\xbc\xc3\x9fe\r\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "text"]


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "file", b"x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")}
    assert len(modes) == 1


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails(number))
        with pytest.raises(RunError, match=r"the disk is full .*file needs 3 bytes and \d+ are free; .*free some space"):
            write_text(file, "new", RunError)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupt_at_any_call_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    for call in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_bytes(tmp_path / "file", b"new")
        assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    write_bytes(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_file_and_directory_are_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_bytes(tmp_path / "file", b"x")
    assert synced == [False, True]


def test_a_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fail(number: int) -> Any:
        return lambda d: fails(number)() if stat.S_ISDIR(os.fstat(d).st_mode) else fsync(d)

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    write_bytes(tmp_path / "file", b"some file systems cannot sync directories")
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(PqkvError, match="is written, but its directory cannot be synced"):
        write_bytes(tmp_path / "file", b"x")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file/below", "Not a directory|File exists"), ("directory", "Is a directory"), ("nul\0byte", "null byte")],
)
def test_impossible_places(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(ArtifactError, match=f"cannot be written: .*({reason}).*; choose another place"):
        write_bytes(tmp_path / name, b"x", ArtifactError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    (tmp_path / ".file.0123456789ab.tmp").write_bytes(b"half of it")
    others = [tmp_path / name for name in (".other.0123456789ab.tmp", ".file.tmp", ".file.0123456789ab.tmp.bak")]
    for other in others:
        other.touch()
    write_text(file, "new")
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])


def test_what_a_living_writer_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, replace = tmp_path / "file", os.replace
    meanwhile = []

    def look(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_text(file, "the other's")
        meanwhile.append((file.read_text(), source.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_text(file, "mine")
    assert meanwhile == [("the other's", True)]
    assert (file.read_text(), list(tmp_path.iterdir())) == ("mine", [file])


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "made"
    with new_directory(target, RunError) as unfinished:
        (unfinished / "file").write_text("x")
        assert is_temporary(unfinished) and not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["made"] and (target / "file").read_text() == "x"
    with pytest.raises(KeyError), new_directory(tmp_path / "other", RunError) as unfinished:
        (unfinished / "file").write_text("x")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_who_makes_a_directory_second_keeps_the_first(tmp_path: Path) -> None:
    with new_directory(tmp_path / "made", RunError) as late:
        with new_directory(tmp_path / "made", RunError) as early:
            assert early.is_dir() and late.is_dir()  # the first is alive and was not taken for left behind
            (early / "first").touch()
        (late / "second").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_directories_of_the_dead_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".made.0123456789ab.tmp").mkdir()
    (tmp_path / ".made.0123456789ab.tmp" / "half").touch()
    with new_directory(tmp_path / "made", RunError):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"cannot be written: .*choose another place"),
        new_directory(tmp_path / "file" / "x", RunError),
    ):
        pass
    with pytest.raises(RunError, match=r"the disk is full .* does not fit"), new_directory(tmp_path / "made", RunError):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="directories cannot be opened on Windows")
def test_a_directory_that_cannot_be_opened_is_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RunError, match=r"cannot be written: .*Permission denied"), new_directory(tmp_path / "made", RunError):
        pass


def test_turns_are_taken_one_by_one(tmp_path: Path) -> None:
    with turn(tmp_path / "a" / ".lock"):
        pass
    with turn(tmp_path / "a" / ".lock"):
        assert (tmp_path / "a" / ".lock").stat().st_size == 0
