"""What a tokenizer puts around a text: the tokens that every prompt begins with, and end tokens. Knows tokenizers, no models.

Most tokenizers put one beginning-of-sequence token in front, some put several (``[gMASK]<sop>``), some none, and some put an
end token behind the text. A model must be shown every text with the beginning it was trained on, once, and without an end
token, after which it would not go on. Everything that feeds text to a model asks here.
"""

from collections.abc import Sequence
from typing import Any

# They begin and end with different letters, so what their encodings share at an end is not of the text.
_PROBES = ("a b", "x y", "7 5", "Q Z")


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that `tokenizer` begins every encoding with; an empty list where there are none."""
    head, _ = _added(tokenizer)
    return head + _always(tokenizer)[0]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` alone, with nothing in front or behind, whatever the tokenizer adds."""
    ids = _encoded(tokenizer, text, special=False)
    if not ids or _special(tokenizer).isdisjoint((ids[0], ids[-1])):
        return ids
    head, tail = _always(tokenizer)
    if ids[: len(head)] == head:
        ids = ids[len(head) :]
    return ids[: len(ids) - len(tail)] if tail and ids[-len(tail) :] == tail else ids


def whole_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a whole prompt: the prefix once, also where `text` has it written out, and no end token."""
    prefix, ids = prefix_ids(tokenizer), plain_ids(tokenizer, text)
    return prefix + ids[_written(prefix, ids) :]


def end_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that `tokenizer` ends every encoding with unless told not to; an empty list where there are none."""
    _, tail = _added(tokenizer)
    return _always(tokenizer)[1] + tail


def _written(prefix: list[int], ids: list[int]) -> int:
    """Return how many of the first `ids` are tokens of `prefix`: all of it, its beginning or, as templates do, its end."""
    for size in range(len(prefix), 0, -1):
        if ids[:size] in (prefix[:size], prefix[-size:]):
            return size
    return 0


def _encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    options = {} if special else {"add_special_tokens": False}
    ids: list[int] = list(tokenizer(text, verbose=False, **options)["input_ids"])
    return ids


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what is put in front and behind where the tokenizer is not told to leave it."""
    whole, plain = ([_encoded(tokenizer, text, special=special) for text in _PROBES] for special in (True, False))
    places = [_place(all_ids, ids) for all_ids, ids in zip(whole, plain, strict=True)]
    start = places[0]
    if start is None or len(set(places)) > 1:  # a text is cut into other tokens where something stands in front of it
        return _shared(whole)
    return whole[0][:start], whole[0][start + len(plain[0]) :]


def _place(all_ids: list[int], ids: list[int]) -> int | None:
    """Return where `ids` begin within `all_ids`."""
    return next((start for start in range(len(all_ids) - len(ids) + 1) if all_ids[start : start + len(ids)] == ids), None)


def _always(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that stand in front and behind even where the tokenizer is told to add none."""
    special = _special(tokenizer)
    head, tail = _shared([_encoded(tokenizer, text, special=False) for text in _PROBES])
    num_head = next((i for i, token in enumerate(head) if token not in special), len(head))
    num_tail = next((i for i, token in enumerate(reversed(tail)) if token not in special), len(tail))
    return head[:num_head], tail[len(tail) - num_tail :]


def _special(tokenizer: Any) -> set[int]:
    """Return the special tokens but that of unknown words, which may be all that a text of probes is made of."""
    return set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}


def _shared(rows: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Return what all `rows` begin and end with."""
    head = _shared_head(rows)
    tail = _shared_head([row[len(head) :][::-1] for row in rows])[::-1]
    return head, tail


def _shared_head(rows: Sequence[list[int]]) -> list[int]:
    size = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))
    return rows[0][:size]
