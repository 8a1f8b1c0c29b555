"""Text of a data set of the hub, or of a local one that the package `datasets` reads. Knows no tokenizers.

A source reads ``hf:ORG/NAME?name=CONFIG&split=SPLIT&column=COLUMN&rows=N&revision=COMMIT``; all behind the question mark may be
left out. Rows come in the data set's own order, and an empty line stands between two of them, as in the customary perplexity
text of wikitext.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

from pqkv_cli.calibration.row_text import joined_rows
from pqkv_cli.errors import DataError, UsageError, did_you_mean
from pqkv_cli.hf.own_code import NO_CODE, needs_own_code

HUB = "hf:"
_KEYS = ("name", "split", "column", "rows", "revision")
_FORM = f"{HUB}ORG/NAME?name=CONFIG&split=train&column=text&rows=1000"


def hub_text(source: str) -> str:
    """Return the text of the data set that `source` names, its rows joined by empty lines; at most 64 Mi characters of it.

    A row's column holds a text, or turns of a conversation, as `joined_rows` takes them.

    Raises
    ------
    UsageError
        If `source` is not understood.
    DataError
        If the data set cannot be had, or has no such column.
    """
    name, options = _parsed(source)
    return joined_rows(source, _rows(source, name, options), options.get("column"), int(options.get("rows", 0)) or None)


def _parsed(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _KEYS:
            raise UsageError(f"data {source!r} has {key!r}{did_you_mean(key, _KEYS)}; known are {', '.join(_KEYS)}: {_FORM}")
    rows = options.get("rows", "1")
    if not name or not rows.isdecimal() or int(rows) < 1:
        found = "no name" if not name else f"rows={rows!r}"
        raise UsageError(f"data {source!r} has {found}; expected {_FORM}, with one row or more")
    return name, options


def _rows(source: str, name: str, options: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    try:
        load_dataset = import_module("datasets").load_dataset  # the small runtime lives without it
    except ImportError as error:
        raise DataError(f"data {source} needs the package datasets, which is not installed: pip install datasets") from error
    split = options.get("split", "train")
    try:
        revision = options.get("revision")
        yield from load_dataset(
            name, options.get("name"), split=split, revision=revision, streaming=True, trust_remote_code=NO_CODE
        )
    except Exception as error:  # the ways of a hub and of its formats to fail have no common base
        if needs_own_code(error):
            raise DataError(
                f"data {source} needs code of its own, which pqkv never runs; expected a data set of plain files (Parquet, "
                "JSON Lines, CSV). Convert it, or give a text file."
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"data {source} cannot be had ({type(error).__name__}: {reason}); expected {_FORM}, online or in the hub's cache; "
            "a UTF-8 text file needs neither"
        ) from error
