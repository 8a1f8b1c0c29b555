import json
from pathlib import Path

import pytest

from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.sample_log import SampleLog

KEY = {"task": "t", "settings": {"seed": 0}}


def filled(path: Path) -> SampleLog:
    log = SampleLog(path, KEY)
    log.add("a", [{"name": "a/0", "score": 1.0}, {"name": "a/1", "score": 0.1 + 0.2, "text": "日本\u2028語\n"}], {"ms": [1.5]})
    log.add("b", [{"name": "b/0"}], {})
    return log


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    first = filled(tmp_path / "t.jsonl")
    again = SampleLog(tmp_path / "t.jsonl", KEY)
    assert again.num_found == first.num_found == 3
    assert again.get("a") == first.get("a")
    assert again.get("a").samples[1] == {"name": "a/1", "score": 0.1 + 0.2, "text": "日本\u2028語\n"}  # type: ignore[union-attr]
    assert again.get("c") is None


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_a_file_cut_anywhere_keeps_whole_groups(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    filled(path)
    part = tmp_path / "t.part.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-cut])
    again = SampleLog(path, KEY)
    assert {name for name in "ab" if again.get(name)} in ({"a"}, set())
    # What is added now reads back together with what was kept.
    again.add("b", [{"name": "b/0"}], {})
    if again.num_found == 3:
        assert part.read_bytes() == whole


@pytest.mark.parametrize("key", [{"task": "t", "settings": {"seed": 1}}, None])
def test_other_settings_start_anew(key: dict[str, object] | None, tmp_path: Path) -> None:
    filled(tmp_path / "t.jsonl")
    assert SampleLog(tmp_path / "t.jsonl", key).num_found == 0
    assert not (tmp_path / "t.part.jsonl").exists()


def test_a_finished_file_is_kept_and_not_gone_on_with(tmp_path: Path) -> None:
    filled(tmp_path / "t.jsonl").finish()
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [line.get("name") for line in lines] == [None, "a/0", "a/1", None, "b/0", None]
    assert SampleLog(tmp_path / "t.jsonl", KEY).num_found == 0


def test_without_a_path_nothing_is_remembered() -> None:
    log = SampleLog()
    assert log.add("a", [{"name": "x"}], {"n": 1}).facts == {"n": 1}
    assert (log.num_found, log.get("a")) == (0, None)
    log.finish()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: .*; free some space or fix the rights"):
        SampleLog(tmp_path / "file" / "t.jsonl", KEY).add("a", [], {})
