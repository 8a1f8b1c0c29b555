"""What identifies a text: its content wherever that can be read."""

import sys
from pathlib import Path

from pqkv_cli.pipeline.fingerprints import text_identity


def test_files_and_rows_are_known_by_what_they_hold(tmp_path: Path) -> None:
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("the same")
    two.write_text("the same")
    assert text_identity(str(one)) == text_identity(str(two))
    two.write_text("another")
    assert text_identity(str(one)) != text_identity(str(two))
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "qasper.jsonl").write_text("{}\n")
    before = text_identity(str(rows))
    (rows / "notes.txt").write_text("no rows")
    assert text_identity(str(rows)) == before
    (rows / "trec.jsonl").write_text("{}\n")
    assert text_identity(str(rows)) != before


def test_a_local_data_set_is_known_by_its_files_and_one_of_the_hub_by_its_name(tmp_path: Path) -> None:
    assert text_identity("hf:org/name?split=test") == "hf:org/name?split=test"
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text('{"text": "one"}\n')
    source = f"hf:{tmp_path / 'set'}?split=train"
    before = text_identity(source)
    assert before.startswith(source) and text_identity(source) == before
    assert text_identity(source.replace("train", "test")) != before
    (data / "train.jsonl").write_text('{"text": "two"}\n')
    assert text_identity(source) != before


def test_the_standard_library_is_known_by_its_version() -> None:
    assert text_identity("stdlib:calibration").endswith(f"of Python {sys.version.split()[0]}".rstrip("+"))
