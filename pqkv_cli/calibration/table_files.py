"""Rows of table files (JSON lines, CSV, Parquet), compressed or not. Refuses files that hold no text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pqkv_cli.calibration.row_text import TEXT_COLUMN, TURN_COLUMNS, BadRow
from pqkv_cli.errors import DataError, first_line

PACKED_ENDS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")
# What files of other forms begin with, what they are, and the way out.
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or an office document)", "Unpack it, and name the folder or a text file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, and name the folder or a text file"),
    (b"Rar!", "a rar archive", "Unpack it, and name the folder or a text file"),
    (b"%PDF-", "a PDF document", "Convert it to text, for example with pdftotext"),
    (b"ARROW1", "an Arrow file", "Write it as Parquet or JSON lines"),
    (b"\xff\xff\xff\xff", "an Arrow stream (or other binary data)", "Write it as Parquet or JSON lines"),
    (b"Obj\x01", "an Avro file", "Write it as Parquet or JSON lines"),
    (b"ORC", "an ORC file", "Write it as Parquet or JSON lines"),
    (b"SQLite format 3\x00", "an SQLite data base", "Write the table as CSV or JSON lines"),
    (b"\x89HDF", "an HDF5 file", "Write it as Parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "Write it as UTF-8 text"),
    (b"GGUF", "a model in GGUF", "Name a text file"),
    (b"version https://git-lfs.github.com/spec/", "a pointer of git-lfs", "Fetch the file itself with 'git lfs pull'"),
    (b"\x1f\x9d", "compressed with compress", "Unpack it with uncompress"),
)


def unpacked(raw: bytes, path: Path, where: str) -> bytes:
    """Return what `raw`, the bytes of `path`, holds once it is unpacked; itself where it is not packed.

    Raises
    ------
    DataError
        If it is damaged, cannot be unpacked here, or is of a form that holds no text.
    """
    for magic, (name, unpack) in _PACKED.items():
        if raw.startswith(magic):
            raw = _opened(raw, name, unpack, path, where)
            break
    for magic, what, way in _REFUSED:
        if raw.startswith(magic) and not (magic == b"ORC" and path.suffix.lower() != ".orc"):
            raise DataError(f"{where} is {what}; expected UTF-8 text, JSON lines, JSON, CSV or Parquet. {way}.")
    if raw[257:262] == b"ustar":
        raise DataError(f"{where} is a tar archive; expected UTF-8 text or rows. Unpack it, and name the folder or a file.")
    return raw


def _opened(raw: bytes, name: str, unpack: Callable[[bytes], bytes], path: Path, where: str) -> bytes:
    try:
        return unpack(raw)
    except ImportError as error:
        raise DataError(
            f"{where} is compressed with {name}, and nothing here unpacks that: pip install pyarrow, or {name} -d {path}"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{where} is compressed with {name} and damaged ({error}); expected the whole file. Copy it again, or unpack it."
        ) from error


def _by_arrow(compression: str) -> Callable[[bytes], bytes]:
    def unpack(raw: bytes) -> bytes:
        found: bytes = import_module("pyarrow").input_stream(io.BytesIO(raw), compression=compression).read()
        return found

    return unpack


_PACKED: Mapping[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
    b"\x5d\x00\x00": ("lzma", lzma.decompress),
    b"\x28\xb5\x2f\xfd": ("zstd", _by_arrow("zstd")),
    b"\x04\x22\x4d\x18": ("lz4", _by_arrow("lz4")),
}


ROW_FORMS = ("jsonl", "csv", "tsv", "parquet", "json")
_ENDS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_SENTINEL = "the end"  # put behind a table: it is a line of its own unless a quotation mark before it is open
_LISTS = ("data", "rows", "train", "examples", "instances", "items")  # where JSON files with one object hold their rows


def form_of(path: Path, raw: bytes = b"") -> str:
    """Return the form of `ROW_FORMS` that the name of `path`, or its first bytes `raw`, tells; empty where it is none."""
    if raw.startswith(b"PAR1"):
        return "parquet"
    ends = [end.lower() for end in path.suffixes]
    while ends and ends[-1] in PACKED_ENDS:
        ends.pop()
    return _ENDS.get(ends[-1], "") if ends else ""


def stem_of(path: Path) -> str:
    """Return the name of `path` without the ends that tell its form and how it is packed."""
    name = path.name
    while (end := Path(name).suffix.lower()) and (end in PACKED_ENDS or end in _ENDS):
        name = name[: -len(end)]
    return name


def rows_in(form: str, content: Any, where: str) -> list[Any]:
    """Return the rows of `content`, the text of a file of this `form`, of Parquet its bytes; `where` is what messages call it.

    Raises
    ------
    DataError
        If it is damaged.
    """
    if form == "parquet":
        return _parquet_rows(content, where)
    if form in ("csv", "tsv"):
        return _csv_rows(content, form, where)
    return _json_rows(content, where) if form == "json" else _line_rows(content)


def _line_rows(text: str) -> list[Any]:
    # Not splitlines(): texts hold separators that it takes for the end of a line.
    rows = [parsed_line(line) for line in text.split("\n") if line.strip()]
    if rows and isinstance(rows[0], BadRow):
        whole = parsed_line(text)  # one JSON document over many lines, only named like JSON lines
        return rows if isinstance(whole, BadRow) else _document_rows(whole)
    return rows


def _json_rows(text: str, where: str) -> list[Any]:
    whole = parsed_line(text)
    if not isinstance(whole, BadRow):
        return _document_rows(whole)
    rows = _line_rows(text)
    if not rows or isinstance(rows[0], BadRow):
        raise DataError(f"{where} {whole.reason}; expected JSON: a list of rows, or a row per line. Write it again.")
    return rows


def parsed_line(text: str) -> Any:
    """Return what the JSON `text` holds, or a `BadRow`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(f"is no JSON ({error})")


def _document_rows(document: Any) -> list[Any]:
    if isinstance(document, list):
        return [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in document]
    if isinstance(document, dict) and not {TEXT_COLUMN, *TURN_COLUMNS} & document.keys():
        for name in _LISTS:
            if isinstance(document.get(name), list):
                return _document_rows(document[name])
    columns = {name: _column(values) for name, values in document.items()} if isinstance(document, dict) else {}
    sizes = {-1 if values is None else len(values) for values in columns.values()}
    if len(sizes) == 1 and -1 not in sizes and not set(TURN_COLUMNS) & columns.keys():
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [document]


def _column(values: Any) -> list[Any] | None:
    """Return the cells of a column of a table that is written by columns."""
    if isinstance(values, dict) and values and all(str(key).isdecimal() for key in values):
        return list(values.values())
    return values if isinstance(values, list) else None


def _csv_rows(text: str, form: str, where: str) -> list[Any]:
    head = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if form == "tsv" else max(",;\t", key=head.count)
    before = csv.field_size_limit(2**31 - 1)  # documents are longer than the usual limit
    try:
        return _cells_by_name(list(csv.reader(io.StringIO(f"{text}\n{_SENTINEL}", newline=""), delimiter=delimiter)))
    except (csv.Error, ValueError) as error:
        raise DataError(f"{where} is no CSV ({error}); expected a line of column names and rows. Write it again.") from error
    finally:
        csv.field_size_limit(before)


def _cells_by_name(lines: list[list[str]]) -> list[Any]:
    """Return rows of named cells; a line that does not fit the names is a `BadRow`, because its cells cannot be told apart."""
    if lines.pop() != [_SENTINEL]:
        raise ValueError("a quotation mark is opened and never closed")
    names, *others = [cells for cells in lines if cells] or [[]]
    return [
        dict(zip(names, cells, strict=False))
        if len(cells) <= len(names)
        else BadRow(f"has {len(cells)} cells for {len(names)} columns, as where a text with commas stands without quotes")
        for cells in others
    ]


def _parquet_rows(raw: bytes, where: str) -> list[Any]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{where} is Parquet, which needs the package pyarrow: pip install pyarrow, or give JSON lines"
        ) from error
    try:
        return list(_table_rows(parquet.ParquetFile(io.BytesIO(raw))))
    except Exception as error:  # the errors of the package have no base of their own
        raise DataError(f"{where} is damaged Parquet ({first_line(error)}); expected the whole file. Copy it again.") from error


def _table_rows(file: Any) -> Iterator[Any]:
    for batch in file.iter_batches():
        yield from batch.to_pylist()
