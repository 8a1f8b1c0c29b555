"""Reads texts from files of every customary form: plain, JSON lines, JSON, CSV, Parquet, compressed. Knows no tokenizers.

A form is known by the end of a file's name, or by what it holds; what is no text and has no column of text is refused, never
read as if it were text. ``PATH?column=NAME`` names the column.
"""

import io
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pqkv_cli.calibration.row_text import joined_rows
from pqkv_cli.calibration.table_files import ROW_FORMS, form_of, rows_in, unpacked
from pqkv_cli.errors import DataError

_COLUMN = "?column="
_TABLES = tuple(form for form in ROW_FORMS if form != "json")  # JSON is as often settings as it is rows
_TEXT_ENDS = (".txt", ".text", ".md")


def named_file(source: str) -> tuple[Path, str | None]:
    """Return the path and the column that `source` names; no column where it names none."""
    path = Path(source).expanduser()
    name, mark, column = source.rpartition(_COLUMN)
    return (Path(name).expanduser(), column) if mark and column and not path.exists() else (path, None)


def files_of(directory: Path) -> list[Path]:
    """Return the files of `directory` that hold its rows or text, in the order of their names.

    They are its tables (JSON lines, CSV, Parquet), or where there are none its JSON files, or its texts.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    by_form: dict[str, list[Path]] = {}
    for file in files:
        by_form.setdefault(form_of(file), []).append(file)
    tables = [file for form in _TABLES for file in by_form.get(form, [])]
    texts = [[file for file in by_form.get("", []) if end in file.suffixes] for end in _TEXT_ENDS]
    return next((found for found in (sorted(tables), by_form.get("json", []), *texts) if found), [])


def file_text(path: Path, column: str | None) -> str:
    """Return the text of the file, or of all files of the directory, `path`.

    Raises
    ------
    DataError
        If there is none, it cannot be read, or it is in a form that has no text; the message says the way out.
    """
    if not path.is_dir():
        return _one_text(path, column)
    _check_folder(path)
    files = files_of(path)
    if not files:
        raise DataError(
            f"data {path} is a directory without texts (*.txt) or rows (*.jsonl, *.json, *.csv, *.parquet) in it; expected a "
            "UTF-8 text file. Name one file."
        )
    forms = sorted({form_of(file) for file in files})
    if len(forms) > 1:
        raise DataError(f"data {path} is a directory with files of several forms ({', '.join(forms)}). Name one file in it.")
    return "\n\n".join(_one_text(file, column) for file in files)


def _check_folder(path: Path) -> None:
    """Refuse a folder whose rows are not in the files that would be read: below it, or in a form that is not read."""
    if any(form_of(file) in _TABLES or {".txt", ".text"} & set(file.suffixes) for file in files_of(path)):
        return
    for arrow in sorted(path.glob("*.arrow")):
        read_raw(arrow, f"data {arrow}")
    below = sorted({file.parent for file in path.rglob("*") if form_of(file) in _TABLES and file.is_file()})
    if below:
        raise DataError(
            f"data {path} has its rows in folders below it; expected files of text or rows. Name one of these: "
            f"{', '.join(map(str, below[:5]))}{', ...' if len(below) > 5 else ''}"
        )


def decoded(raw: bytes, where: str) -> str:
    """Return `raw` as text.

    Raises
    ------
    DataError
        If it is not UTF-8; the byte is named.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark.
        start = error.start + (len(raw) - len(error.object))
        raise DataError(
            f"{where} is not UTF-8: byte 0x{raw[start]:02x} at offset {start} ({error.reason}). "
            "Convert it, for example with iconv -t UTF-8."
        ) from error
    if 4 * text[:4096].count("\0") > len(text[:4096]):
        raise DataError(f"{where} is mostly zero bytes: UTF-16, or no text. Convert it, for example with iconv -t UTF-8.")
    return text


def read_raw(path: Path, where: str) -> bytes:
    """Return the bytes of `path`, unpacked.

    Raises
    ------
    DataError
        If it is not there, cannot be read, is damaged, or is in a form that is not understood.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{where} is not there; expected a UTF-8 text file or stdlib:broad.") from error
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror}); expected a UTF-8 text file.") from error
    return unpacked(raw, path, where)


def file_rows(path: Path) -> list[Any]:
    """Return the rows of a file in one of `ROW_FORMS`; a line that is no JSON is a `BadRow`.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    raw = read_raw(path, str(path))
    form = form_of(path, raw) or "jsonl"
    return rows_in(form, raw if form == "parquet" else decoded(raw, str(path)), str(path))


def _one_text(path: Path, column: str | None) -> str:
    where = f"data {path}"
    raw = read_raw(path, where)
    form = form_of(path, raw)
    if form == "parquet":
        return joined_rows(where, rows_in(form, raw, where), column)
    text = decoded(raw, where)
    if not text.strip():
        raise DataError(f"{where} is empty ({len(raw)} bytes); expected UTF-8 text.")
    form = form or _json_form(text)
    if form:
        return joined_rows(where, rows_in(form, text, where), column)
    if column is not None:
        raise DataError(f"{where} is plain text, which has no column {column!r}; leave out {_COLUMN}{column}")
    return text


def _json_form(text: str) -> str:
    """Return whether what is named like a text is rows all the same: ``jsonl``, ``json`` or nothing."""
    if not text.lstrip().startswith(("{", "[")):
        return ""
    first = list(islice(filter(str.strip, io.StringIO(text, newline="\n")), 2))
    if first[0].lstrip().startswith("{") and _all_json(first):
        return "jsonl"
    return "json" if _all_json([text]) else ""


def _all_json(texts: Sequence[str]) -> bool:
    try:
        return all(isinstance(json.loads(text), dict | list) for text in texts)
    except (ValueError, RecursionError):
        return False
