"""The text of rows: of a column of text, or of the turns of a conversation. Knows rows, no files.

One bad row never ends a run: rows without text are left out and counted, and only where no row has any it is an error.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pqkv_cli.errors import DataError, did_you_mean

TEXT_COLUMN, TURN_COLUMNS = "text", ("messages", "conversations", "conversation")
_CONTENTS = ("content", "value", "text")  # where turns of the customary forms hold what is said
_SHOWN, _MOST_NAMES = 40, 12  # characters of a value, and names, in a message
_MOST_CHARACTERS = 2**26  # what is calibrated or evaluated on is a few megabytes; a data set may be terabytes


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not even be read, with the reason."""

    reason: str


def joined_rows(source: str, rows: Iterable[Any], column: str | None, most: int | None = None) -> str:
    """Return the texts of `rows`, at most `most` of them and about 64 Mi characters, with an empty line between two.

    Parameters
    ----------
    source
        What messages call the rows.
    rows
        Mappings of columns, plain texts, or `BadRow`; messages count them from 0.
    column
        Where the text is; None takes `TEXT_COLUMN`, else a column of turns.

    Raises
    ------
    DataError
        If no row has text; the first is named with the reason.
    """
    texts: list[str] = []
    faults: list[str] = []
    size = total = num_turns = 0
    for number, row in enumerate(rows):
        if number == most:
            break
        if size > _MOST_CHARACTERS:
            warnings.warn(f"{source} is read up to row {number} only: the text has {size} characters by then", stacklevel=3)
            break
        found, total = row_text(row, column), number + 1
        if isinstance(found, BadRow):
            faults.append(f"row {number} {found.reason}")
            continue
        texts.append(found[0])
        num_turns += found[1]
        size += len(found[0]) + 2
    joined = "\n\n".join(texts)
    if not joined.strip():
        raise _no_text(source, total, faults, column)
    _say_skipped(source, total, faults, num_turns)
    return joined


def row_text(row: Any, column: str | None) -> tuple[str, int] | BadRow:
    """Return the text of `row` and how many turns of it have none, or why it has no text."""
    if isinstance(row, BadRow | str):
        return _checked(row, 0) if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        return BadRow(f"is {_shown(row)}; expected columns with a text in one of them")
    names = (column,) if column is not None else (TEXT_COLUMN, *TURN_COLUMNS)
    present = [name for name in names if name in row]
    if not present:
        nearest = did_you_mean(names[0], map(str, row))
        return BadRow(f"has no column {names[0]!r}{nearest}; it has {listed(row)}: name one with ?column=NAME")
    try:
        found = [_cell_text(row[name], name) for name in present]
    except RecursionError:
        return BadRow("is nested too deeply; expected a text, or turns with a 'content' each")
    texts = [text for text in found if not isinstance(text, BadRow)]
    return next((text for text in texts if text[0].strip()), (*texts, *found)[0])


def listed(names: Iterable[Any]) -> str:
    """Return `names` for a message, which a whole text in the place of a name must not fill."""
    shown = [name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..." for name in map(str, names)]
    return ", ".join(shown[:_MOST_NAMES]) + (", ..." if len(shown) > _MOST_NAMES else "") or "none"


def _cell_text(value: Any, name: str) -> tuple[str, int] | BadRow:
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError, RecursionError):  # tables without nested columns hold turns as JSON
            parsed = json.loads(value)
            value = parsed if name in TURN_COLUMNS or _are_turns(parsed) else value
    if isinstance(value, str):
        return _checked(value, 0)
    turns = value if isinstance(value, list | tuple) else [value]
    contents = [_said(turn) for turn in turns]
    kept = [content for content in contents if content is not None]
    if not kept:
        return BadRow(f"has no text: {name} is {_shown(value)}; expected a text, or turns with a 'content' each")
    return _checked("\n".join(kept), len(contents) - len(kept))


def _are_turns(parsed: Any) -> bool:
    """Return whether nothing but the turns of a conversation looks like `parsed`; any other JSON in a column is its text."""
    keys = [set(turn) if isinstance(turn, Mapping) else set() for turn in parsed] if isinstance(parsed, list) else []
    return bool(keys) and all(own & {"role", "from"} and own & set(_CONTENTS) for own in keys)


def _said(turn: Any) -> str | None:
    """Return what is said in a turn, or in a part of one; None where there is no text (a picture, a call of a tool)."""
    if isinstance(turn, str):
        return turn
    if isinstance(turn, list | tuple):
        parts = [part for part in map(_said, turn) if part is not None]
        return "\n".join(parts) if parts else None
    if not isinstance(turn, Mapping):
        return None
    return next((said for name in _CONTENTS if (said := _said(turn.get(name))) is not None), None)


def _checked(text: str, num_turns: int) -> tuple[str, int] | BadRow:
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRow(f"holds half a character (a lone surrogate) in {_shown(text)}; expected whole ones")
    return text, num_turns


def _no_text(source: str, total: int, faults: list[str], column: str | None) -> DataError:
    if faults:
        others = f"; none of the {total} has text" if total > 1 else ""
        return DataError(f"{source}, {faults[0]}{others}")
    wanted = column or TEXT_COLUMN
    return DataError(f"{source} has {total} rows and no text in them; expected text in the column {wanted!r}")


def _say_skipped(source: str, total: int, faults: list[str], num_turns: int) -> None:
    if faults:
        left_out = f"{len(faults)} of {total} rows have no text and are left out; the first: {faults[0]}"
        warnings.warn(f"{source}: {left_out}", stacklevel=4)
    if num_turns:
        warnings.warn(f"{source}: {num_turns} turns without text (such as calls of tools) are left out", stacklevel=4)


def _shown(value: Any) -> str:
    return repr(str(value)[:_SHOWN]) if value is not None else "null"
