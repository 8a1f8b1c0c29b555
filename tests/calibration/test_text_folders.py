"""Folders of texts and rows: what they hold is read, and what merely lies beside the rows is not taken for them."""

import gzip
from pathlib import Path

import pytest

from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import DataError


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    assert load_text(str(tmp_path)) == "about"
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    assert load_text(str(tmp_path)) == "one\n\ntwo"
    (tmp_path / "info.json").write_text('{"text": "said"}')
    assert load_text(str(tmp_path)) == "said"
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second", "body": "2"}'))
    (tmp_path / "1.jsonl").write_text('{"text": "first", "body": "1"}')
    assert load_text(str(tmp_path)) == "first\n\nsecond"
    assert load_text(f"{tmp_path}?column=body") == "1\n\n2"
    (tmp_path / "3.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"files of several forms \(csv, jsonl\). Name one file in it"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("within", ["data/train.parquet", "raw/1.jsonl.gz", "a/b/c.csv"])
def test_what_lies_beside_the_rows_is_not_taken_for_them(within: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / within).parent.mkdir(parents=True)
    (tmp_path / within).write_bytes(b"")
    folder = (tmp_path / within).parent
    with pytest.raises(DataError, match=f"has its rows in folders below it; .* Name one of these: {folder}"):
        load_text(str(tmp_path))


def test_texts_beside_a_folder_of_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").write_text("text\ntwo\n")
    assert load_text(str(tmp_path)) == "one"


def test_a_folder_of_a_form_that_is_not_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"builder_name": "x"}')
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(DataError, match="is an Arrow stream .*Write it as Parquet or JSON lines"):
        load_text(str(tmp_path))
