"""Text to windows of tokens. Knows where texts come from, and tokenizers; no models."""

import sys
from typing import Any

import torch

from pqkv_cli.calibration.hub_text import HUB, hub_text
from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.stdlib_text import TEXTS, stdlib_text
from pqkv_cli.calibration.text_files import file_text, named_file
from pqkv_cli.errors import DataError, did_you_mean
from pqkv_cli.models.prefix import plain_ids, prefix_ids

_STDLIB = "stdlib:"


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
            f"file, {_STDLIB}evaluation or {HUB}ORG/NAME. A file of that name is ./{SELF}"
        )
    if source.startswith(HUB):
        return hub_text(source)
    if source.startswith(_STDLIB):
        name = source.removeprefix(_STDLIB)
        if name not in TEXTS:
            known = ", ".join(_STDLIB + known for known in TEXTS)
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
