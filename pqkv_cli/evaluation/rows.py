"""Rows of a task's own data: JSON lines in a file, or in the files of a directory. Knows columns, no tasks."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pqkv_cli.errors import DataError, did_you_mean

Row = dict[str, Any]


def read_rows(path: Path, columns: Mapping[str, type | tuple[type, ...]]) -> dict[str, list[Row]]:
    """Return the rows of `path` by file name (without suffix), each with `columns` of the given types.

    Raises
    ------
    DataError
        If there are no rows, or a line is not an object with these columns; the file and the line are named.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = {file.stem: list(_rows(file, columns)) for file in files}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        raise DataError(f"{path} holds no rows; expected JSON lines (*.jsonl) with the columns {', '.join(columns)}")
    return found


def _rows(file: Path, columns: Mapping[str, type | tuple[type, ...]]) -> Iterator[Row]:
    try:
        # Not splitlines(): texts hold separators that it takes for the end of a line.
        content = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected UTF-8 JSON lines") from error
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is no JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} is a {type(row).__name__}; expected an object")
        yield checked_row(row, columns, f"{file}, line {number}")


def checked_row(row: Row, columns: Mapping[str, type | tuple[type, ...]], where: str) -> Row:
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
        if not isinstance(row[name], kinds):
            kind = kinds.__name__ if isinstance(kinds, type) else " or ".join(k.__name__ for k in kinds)
            raise DataError(f"{where}: {name} is {str(row[name])[:40]!r} ({type(row[name]).__name__}); expected {kind}")
    return row
