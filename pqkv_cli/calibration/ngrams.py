"""Hashed runs of normalised words: how two texts are found to overlap. Knows nothing of where texts come from."""

import re
import zlib
from collections.abc import Iterable

_WORD = re.compile(r"\w+")


def ngram_hashes(text: str, length: int = 13) -> set[int]:
    """Return a 32-bit hash of every run of `length` consecutive lower-cased words of `text`."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    return {zlib.crc32(b" ".join(words[i : i + length])) for i in range(len(words) - length + 1)}


def overlap_share(text: str, seen: Iterable[str], length: int = 13) -> float:
    """Return the share of the distinct `length`-word runs of `text` that also occur in the texts `seen`, 0 to 1."""
    own = ngram_hashes(text, length)
    if not own:
        return 0.0
    found: set[int] = set()
    for other in seen:
        found |= own & ngram_hashes(other, length)
    return len(found) / len(own)
