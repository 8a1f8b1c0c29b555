"""What new tokens add to the text of a prompt, all at once or piece by piece. Knows tokenizers, no models.

New tokens decoded alone lose the space before their first word where a tokenizer decodes like SentencePiece, and the character
that the prompt has only begun. Their text is what decoding has more with them than without them.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for one byte, of which decoders join a run: all of it is text, or nothing is
_ANCHOR = 64  # tokens before a piece that are decoded with it


def added_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that the tokens `new` add behind the tokens `prompt`; special tokens have none.

    A character that the prompt begins and the new tokens complete belongs to their text. Where the text of the prompt reads
    otherwise once more follows (spaces before punctuation, for one, which some tokenizers take away), it is what comes behind
    the last character that stays.
    """
    return _behind(_text(tokenizer, prompt), _text(tokenizer, [*prompt, *new]))


class TextPieces:
    """Takes the tokens that ``generate`` hands over, the prompt's first, and gives on the text that is certain.

    All pieces together are the `added_text` of all tokens. The last word is held back until another one begins, because some
    tokenizers still change the space before it; in scripts without spaces, characters are given as they come.

    Parameters
    ----------
    tokenizer
        What decodes.
    on_text
        Receives the pieces.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._prompt: list[int] | None = None
        self._new: list[int] = []
        self._given = ""  # all that was handed over
        self._anchor = 0  # tokens of prompt and new text before it are not decoded for a piece
        self._settled, self._before = 0, 0  # new tokens, and characters given, when the anchor was set

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, T] or [T], then the new tokens [1] one by one."""
        tokens = value.reshape(-1).tolist()
        if self._prompt is None:
            self._prompt = tokens
            self._anchor = self._anchor_before(len(tokens))
            return
        self._new += tokens
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(self._new[-1]))):
            return
        text = self._text_since_anchor()
        certain = text[: _num_certain(text)]
        given = self._given[self._before :]
        if certain.startswith(given) and len(certain) > len(given):
            self._give(certain[len(given) :])
        if certain == text and len(self._new) - self._settled > 4 * _ANCHOR:
            self._settled, self._before = len(self._new), len(self._given)
            self._anchor = self._anchor_before(len(self._prompt) + len(self._new))

    def end(self) -> None:
        """Give what was held back."""
        whole = added_text(self._tokenizer, self._prompt or [], self._new)
        self._give(_behind(self._given, whole))

    def _give(self, piece: str) -> None:
        self._given += piece
        if piece:
            self._on_text(piece)

    def _anchor_before(self, end: int) -> int:
        """Return where to begin to decode what follows the first `end` tokens: some text must stand before it."""
        first = max(end - _ANCHOR, 0)
        known = [*(self._prompt or ()), *self._new][first:end]
        return first if _text(self._tokenizer, known) else 0

    def _text_since_anchor(self) -> str:
        tokens = [*(self._prompt or ()), *self._new]
        known = len(self._prompt or ()) + self._settled
        return added_text(self._tokenizer, tokens[self._anchor : known], tokens[known:])


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def _behind(before: str, whole: str) -> str:
    """Return `whole` without `before`, or what they begin with alike."""
    if whole.startswith(before):
        return whole[len(before) :]
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))) :]


def _num_certain(text: str) -> int:
    """Return how many characters of `text` no further token can change."""
    whole = text.rstrip(_UNFINISHED)
    if whole == text and text and unicodedata.category(text[-1]) == "Lo":  # letters of scripts without capitals
        return len(text)
    return max(whole.rfind(" "), whole.rfind("\n") + 1, 0)
