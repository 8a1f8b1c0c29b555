"""Rows of a task's own data: JSON lines in a file, or in the files of a directory. Knows columns, no tasks."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pqkv_cli.calibration.row_text import BadRow
from pqkv_cli.calibration.table_files import form_of, parsed_line, stem_of
from pqkv_cli.calibration.text_files import decoded, file_rows, files_of, read_raw
from pqkv_cli.errors import DataError, did_you_mean

Row = dict[str, Any]
Kinds = type | tuple[type, ...]


def read_rows(path: Path, columns: Mapping[str, Kinds]) -> dict[str, list[Row]]:
    """Return the rows of `path` by file name (without suffix), each with `columns` of the given types.

    Raises
    ------
    DataError
        If there are no rows, or a line is not an object with these columns; the file and the line are named.
    """
    return {stem_of(file): rows for file, rows in read_row_files(path, columns).items()}


def read_row_files(path: Path, columns: Mapping[str, Kinds]) -> dict[Path, list[Row]]:
    """Return the rows of `path`, a file or a folder of them, by file; otherwise as `read_rows`.

    Raises
    ------
    DataError
        As `read_rows`.
    """
    files = [file for file in files_of(path) if form_of(file) not in ("", "json")] if path.is_dir() else [path]
    found = {file: rows for file in files if (rows := list(_rows(file, columns)))}
    if not found:
        there = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
        has = f"; it holds {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else ""
        wanted = ", ".join(columns) or "of the task"
        raise DataError(f"{path} holds no rows; expected JSON lines (*.jsonl) with the columns {wanted}{has}")
    stems = [stem_of(file) for file in found]
    if twice := [file.name for file in found if stems.count(stem_of(file)) > 1]:
        raise DataError(f"{path} holds the same rows twice ({', '.join(twice)}); expected one file of each name: remove one")
    return found


def _rows(file: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    for number, row in _numbered(file):
        where = f"{file}, line {number}"
        if isinstance(row, BadRow):
            raise DataError(f"{where} {row.reason}; expected one object per line. Write the file again.")
        if not isinstance(row, dict):
            raise DataError(f"{where} is a {type(row).__name__}; expected an object with the columns {', '.join(columns)}")
        yield checked_row(row, columns, where)


def _numbered(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of `file` with their line, or in other forms than JSON lines their number, from 1."""
    if form_of(file) not in ("jsonl", ""):
        yield from enumerate(file_rows(file), 1)
        return
    # Not splitlines(): texts hold separators that it takes for the end of a line.
    for number, line in enumerate(decoded(read_raw(file, str(file)), str(file)).split("\n"), 1):
        if line.strip():
            yield number, parsed_line(line)


def checked_row(row: Row, columns: Mapping[str, Kinds], where: str) -> Row:
    """Return `row` if it has `columns` of the given types.

    Raises
    ------
    DataError
        If not; `where` says where the row stands.
    """
    for name, kinds in columns.items():
        if name not in row:
            nearest, has = did_you_mean(name, set(row) - set(columns)), ", ".join(row) or "none"
            raise DataError(f"{where} has no column {name!r}{nearest}; it has {has}; expected {', '.join(columns)}")
        value = row[name]
        # bool is an int in Python, but a number that is True is a fault.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise DataError(f"{where}: {name} is {shown(value)}; expected {_kind_names(kinds)}. Correct or remove the row.")
    return row


def checked_texts(values: Any, name: str, where: str) -> tuple[str, ...]:
    """Return `values`, a list, if all of it is text.

    Raises
    ------
    DataError
        If not; `where` says where the row stands.
    """
    for i, value in enumerate(values):
        checked_text(value, f"{name}[{i}]", where)
    return tuple(values)


def checked_text(value: Any, name: str, where: str) -> str:
    """Return `value` if it is text that a tokenizer can read.

    Raises
    ------
    DataError
        If not; `where` says where the row stands.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {shown(value)}; expected str. Correct or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name} holds half a character (a lone surrogate) at {error.start}; expected whole ones. Correct the row."
        ) from error
    return value


def shown(value: Any) -> str:
    """Return the beginning of `value` and its type, for a message."""
    return f"{str(value)[:40]!r} ({type(value).__name__})" if value is not None else "null"


def _kind_names(kinds: Kinds) -> str:
    return kinds.__name__ if isinstance(kinds, type) else " or ".join(kind.__name__ for kind in kinds)
