"""Calibration and evaluation text by name: files, the standard library, data sets of the hub. Knows no tokenizers.

A data set is ``hf:ORG/NAME?name=CONFIG&split=SPLIT&column=COLUMN&rows=N&revision=COMMIT``; all behind the question mark may be
left out. Rows come in the data set's own order, and an empty line stands between two of them, as in the customary perplexity
text of wikitext.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

import torch

from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.row_text import joined_rows
from pqkv_cli.calibration.stdlib_text import TEXTS, stdlib_text
from pqkv_cli.calibration.text_files import file_text, named_file
from pqkv_cli.errors import DataError, UsageError, did_you_mean, first_line
from pqkv_cli.hf.loading import NO_CODE, needs_own_code
from pqkv_cli.models.prefix import plain_ids, prefix_ids

HUB, STDLIB = "hf:", "stdlib:"  # what names that are no paths begin with
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
        raise DataError(
            f"data {source} cannot be had ({type(error).__name__}: {first_line(error)}); expected {_FORM}, online or in the "
            "hub's cache; a UTF-8 text file needs neither"
        ) from error


def load_text(source: str) -> str:
    """Return the text of `source`: a file or folder (`file_text`), ``stdlib:NAME`` (`TEXTS`), or a data set (`hub_text`).

    Raises
    ------
    DataError
        If there is no such text, data set or file, or the file is not readable UTF-8 text and has no column of text.
    UsageError
        If a data set is named in a way that is not understood.
    """
    if source == SELF:
        raise DataError(
            f"data {SELF!r} is text that a model writes for its own calibration, and for nothing else; expected a UTF-8 text "
            f"file, {STDLIB}evaluation or {HUB}ORG/NAME. A file of that name is ./{SELF}"
        )
    if source.startswith(HUB):
        return hub_text(source)
    if source.startswith(STDLIB):
        name = source.removeprefix(STDLIB)
        if name not in TEXTS:
            known = ", ".join(STDLIB + known for known in TEXTS)
            raise DataError(f"data {source!r} is unknown; expected one of {known}{did_you_mean(name, tuple(TEXTS))}")
        return stdlib_text(name)
    return file_text(*named_file(source))


def token_windows(
    tokenizer: Any,
    text: str,
    num_windows: int | None,
    window_tokens: int,
    seed: int,
    *,
    at_most: bool = False,
    stride: int | None = None,
) -> torch.Tensor:
    """Return [num_windows, window_tokens] int64 windows of the tokens of `text`, chosen and ordered by `seed`.

    They are disjoint, or begin `stride` tokens apart. Each starts with the tokens that the tokenizer begins
    every text with (`prefix_ids`). None takes all windows there are; `at_most` is content with fewer, but not with none.

    Raises
    ------
    DataError
        If the text is too short, or a number is below one.
    """
    prefix = prefix_ids(tokenizer)
    body = window_tokens - len(prefix)
    if num_windows is None:
        num_windows, at_most = sys.maxsize, True
    if num_windows < 1 or body < 1:
        raise DataError(
            f"{num_windows} windows of {window_tokens} tokens were asked for; expected at least 1 of {len(prefix) + 1}."
        )
    tokens = torch.tensor(plain_ids(tokenizer, text), dtype=torch.int64)
    step = stride or body
    available = max(0, (len(tokens) - body) // step + 1)
    if at_most:
        num_windows = max(1, min(num_windows, available))
    if available < num_windows:
        raise DataError(
            f"the text has {len(tokens)} tokens, enough for {available} windows of {window_tokens}; {num_windows} windows need "
            f"{(num_windows - 1) * step + body} tokens. Give more text, fewer samples or shorter windows."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:num_windows]
    windows = tokens.unfold(0, body, step)[chosen]
    start = torch.tensor(prefix, dtype=torch.int64).expand(num_windows, -1)
    return torch.cat((start, windows), dim=1)
