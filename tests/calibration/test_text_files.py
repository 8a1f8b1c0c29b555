"""Texts in files of every customary form: the text is taken, or the form is refused with the way out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import DataError

TEXTS = ["One \u00fc text.", 'Two, with "quotes"\nand a line.', "Three\u2028."]
WANTED = "\n\n".join(TEXTS)
Row = dict[str, Any]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[Row], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: list[Row]) -> bytes:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(arrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMS: dict[str, Callable[[list[Row]], bytes]] = {
    "x.jsonl": lines,
    "x.ndjson": lines,
    "x.JSONL": lines,
    "x.json": lines,
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "list.jsonl": lambda rows: json.dumps(rows, indent=1).encode(),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "columns.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode(),
    "x.csv": table,
    "semicolon.csv": lambda rows: table(rows, ";"),
    "x.tsv": lambda rows: table(rows, "\t"),
    "x.parquet": parquet,
    "named-otherwise": parquet,
    "looks-like.txt": lines,
    "whole.txt": lambda rows: json.dumps(rows, indent=1).encode(),
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "crlf.jsonl": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
}


PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", ["", *PACKED])
@pytest.mark.parametrize("name", FORMS)
def test_the_text_column_is_taken_in_every_form(name: str, packed: str, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": text, "body": f"body {i}"} for i, text in enumerate(TEXTS)]
    file = tmp_path / (name + packed)
    file.write_bytes(PACKED.get(packed, bytes)(FORMS[name](rows)))
    assert load_text(str(file)) == WANTED
    assert load_text(f"{file}?column=body") == "body 0\n\nbody 1\n\nbody 2"
    with pytest.raises(
        DataError, match=r"row 0 has no column 'bode' \(did you mean 'body'\?\); it has id, text, body: name one"
    ):
        load_text(f"{file}?column=bode")


@pytest.mark.parametrize("packed", PACKED)
def test_packed_text_is_unpacked_whatever_its_name(packed: str, tmp_path: Path) -> None:
    for name in (f"x.txt{packed}", "x.txt"):
        (tmp_path / name).write_bytes(PACKED[packed](WANTED.encode()))
        assert load_text(str(tmp_path / name)) == WANTED
    (tmp_path / "half").write_bytes(PACKED[packed](WANTED.encode() * 99)[:-9])
    with pytest.raises(DataError, match=r"is compressed with \w+ and damaged \(.*Copy it again, or unpack it"):
        load_text(str(tmp_path / "half"))


def test_zstd_is_unpacked(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    file = tmp_path / "x.jsonl.zst"
    with arrow.output_stream(str(file), compression="zstd") as stream:
        stream.write(lines([{"text": text} for text in TEXTS]))
    assert load_text(str(file)) == WANTED


@pytest.mark.parametrize(
    ("begin", "phrase"),
    [
        (b"PK\x03\x04", "is a zip archive .*Unpack it, and name the folder"),
        (b"%PDF-1.7", "is a PDF document; expected UTF-8 text, .*pdftotext"),
        (b"ARROW1\0\0", "is an Arrow file; .*Write it as Parquet or JSON lines"),
        (b"SQLite format 3\x00", "is an SQLite data base"),
        (b"\0" * 257 + b"ustar", "is a tar archive; .*Unpack it"),
        ("plain".encode("utf-16-le") * 9, "is mostly zero bytes: UTF-16, or no text"),
        (b"PAR1 but no more", "is damaged Parquet"),
    ],
)
def test_other_forms_are_refused_with_the_way_out(begin: bytes, phrase: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(begin)
    with pytest.raises(DataError, match=phrase):
        load_text(str(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("x.jsonl", b'{"body": "x"}\n', r"x.jsonl, row 0 has no column 'text'; it has body: name one with \?column=NAME"),
        ("x.json", b"{broken", r"x.json is no JSON \(.*expected JSON: a list of rows, or a row per line"),
        ("x.jsonl", b"{broken\n{too\n", r"row 0 is no JSON \(.*none of the 2 has text"),
        ("x.csv", b"a,b\n1,2\n", "row 0 has no column 'text'; it has a, b"),
        ("x.jsonl", b"[1, 2]\n", "row 0 is '.1, 2.'; expected columns"),
        ("x.jsonl", b'{"text": "\\ud83d"}\n', "row 0 holds half a character"),
        ("x.json", b"[]", "has 0 rows and no text in them"),
        ("x.csv", b'text\n"open, and on\nsecond\n', r"is no CSV \(a quotation mark is opened and never closed\)"),
        ("x.tsv", b'text\tb\n"open\tand on\nsecond\t2\n', "a quotation mark is opened and never closed"),
        ("x.csv", ",".join(map(str, range(99))).encode() + b"\nx\n", r"row 0 has no column 'text'; it has 0: name one"),
        ("x.csv", b"o" * 999 + b"\nand\n", r"it has o{40}\.\.\.: name one"),
        ("x.jsonl", b'{"messages": ' + b"[" * 800 + b'"x"' + b"]" * 800 + b"}", "row 0 is nested too deeply"),
    ],
)
def test_files_without_text_say_so(name: str, content: bytes, phrase: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=phrase):
        load_text(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.txt", "x.parquet", "x.jsonl.gz", "x.csv"])
def test_pointers_of_git_lfs_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(DataError, match="is a pointer of git-lfs; .*git lfs pull"):
        load_text(str(tmp_path / name))


def test_a_line_of_csv_with_too_many_cells_is_left_out_and_never_cut(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text\n1,Hello, world\n\n2,good\n3\n")
    with pytest.warns(UserWarning, match="2 of 3 rows have no text .* row 0 has 3 cells for 2 columns"):
        assert load_text(str(tmp_path / "x.csv")) == "good"


def test_columns_of_unequal_length_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"text": ["one", "two"], "label": [1]}))
    assert load_text(str(tmp_path / "x.json")) == "one\ntwo"


def test_rows_in_a_text_are_known_however_long_they_are(tmp_path: Path) -> None:
    long = "x" * 2**20
    (tmp_path / "x.txt").write_bytes(lines([{"text": long}, {"text": "b"}]))
    assert load_text(str(tmp_path / "x.txt")) == f"{long}\n\nb"


def test_turns_as_json_are_read_in_any_column_and_other_json_is_text(tmp_path: Path) -> None:
    for value, expected in ((json.dumps([GOOD, GOOD]), "hi\nhi"), ('[{"content": 1}]', '[{"content": 1}]'), ("[1]", "[1]")):
        (tmp_path / "x.jsonl").write_bytes(lines([{"chosen": value}]))
        assert load_text(f"{tmp_path / 'x.jsonl'}?column=chosen") == expected


def test_an_empty_text_beside_turns_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": "", "messages": [GOOD]}]))
    assert load_text(str(tmp_path / "x.jsonl")) == "hi"


def test_plain_text_stays_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    for text in ("[1] a reference\n[2] another", "{ open\nand on", '"quoted"\n"twice"', "a,b\n1,2\n", "# {}\n{}"):
        file.write_text(text)
        assert load_text(str(file)) == text
    with pytest.raises(DataError, match=r"is plain text, which has no column 'body'; leave out \?column=body"):
        load_text(f"{file}?column=body")


GOOD = {"role": "user", "content": "hi"}
TURNS = [
    ([GOOD, {"role": "assistant", "content": None, "tool_calls": [{}]}], "hi", 1),
    ([GOOD, {"role": "tool", "tool_calls": []}], "hi", 1),
    ([{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, "two"]}], "one\ntwo", 0),
    ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "hi\nyes", 0),
    (["hi", "yes"], "hi\nyes", 0),
    ({"from": ["human", "gpt"], "value": ["hi", "yes"]}, "hi\nyes", 0),
    ([GOOD, None, 3], "hi", 2),
    (json.dumps([GOOD, GOOD]), "hi\nhi", 0),
    ([{"role": "user", "content": {"text": "hi"}}], "hi", 0),
]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("turns", "expected", "left_out"), TURNS)
def test_turns_of_every_form_are_read(turns: Any, expected: str, left_out: int, column: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{column: turns}]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert load_text(str(tmp_path / "x.jsonl")) == expected
    said = [str(warning.message).partition(": ")[2] for warning in seen]
    assert said == ([f"{left_out} turns without text (such as calls of tools) are left out"] if left_out else [])


BAD: list[Any] = [{"text": None}, {"text": 3}, {"text": []}, {"other": "x"}, {}, None, 7, {"messages": [{"content": None}]}]


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_row_never_ends_a_run_and_is_counted(bad: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for place in range(3):
        rows: list[Any] = [{"text": "good"}, {"text": "better"}]
        rows.insert(place, bad)
        file.write_bytes(lines(rows) + b'{"text": "cut o')
        with pytest.warns(UserWarning, match=rf"2 of 4 rows have no text and are left out; the first: row {place} "):
            assert load_text(str(file)) == "good\n\nbetter"
    file.write_bytes(lines([bad, bad]))
    with pytest.raises(DataError, match="row 0 .*none of the 2 has text"):
        load_text(str(file))


def test_empty_rows_are_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": "a"}, {"text": ""}, {"text": "b"}]))
    assert load_text(str(tmp_path / "x.jsonl")) == "a\n\n\n\nb"
