"""The text that comes with Python: its standard library, in disjoint shares, and how two texts are seen to overlap."""

import hashlib
import pydoc_data.topics
import re
import sysconfig
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

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


# Earlier splits win: a paragraph that calibration shares with training is dropped from calibration.
SPLITS = ("train", "calibration", "evaluation")
# What a text may be called: a split, or all that evaluation leaves.
TEXTS = {**{split: (split,) for split in SPLITS}, "broad": ("train", "calibration")}
_BOUNDS = {"train": 0.86, "evaluation": 0.93, "calibration": 1.0}
_SEAM_CHARS = 500  # longer than any 12 words that matter
_SKIPPED = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo ensurepip encodings __pycache__ pydoc_data "
    "lib-dynload _pyrepl __phello__".split()
)


def split_of(name: str) -> str:
    """Return the split that the document called `name` belongs to."""
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split, bound in _BOUNDS.items() if point < bound)


def split_documents(split: str) -> list[str]:
    """Return the documents of one split, in a fixed order, decontaminated against the earlier splits.

    Raises
    ------
    ValueError
        If `split` is not one of ``train``, ``calibration``, ``evaluation``.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    own = [text for name, text in _documents() if split_of(name) == split]
    seen = _hashes_before(split)
    if not seen:
        return own
    return [kept for text in own if (kept := _without_seen_paragraphs(text, seen))]


def stdlib_text(name: str) -> str:
    """Return a text of `TEXTS` as a single string."""
    return "\n\n".join(document for split in TEXTS[name] for document in split_documents(split))


@cache
def _documents() -> tuple[tuple[str, str], ...]:
    topics = [(f"topic:{name}", text) for name, text in pydoc_data.topics.topics.items()]
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if any(part in _SKIPPED or part.startswith(("config-", "_sysconfigdata")) for part in relative.parts):
            continue
        try:
            sources.append((relative.as_posix(), path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, OSError):
            continue  # A source in another encoding is no loss: it belongs to nobody's split.
    return tuple(sorted(topics + sources))


@cache
def _hashes_before(split: str) -> frozenset[int]:
    hashes: set[int] = set()
    for earlier in SPLITS[: SPLITS.index(split)]:
        for document in split_documents(earlier):
            hashes |= ngram_hashes(document)
    return frozenset(hashes)


def _without_seen_paragraphs(text: str, seen: frozenset[int]) -> str:
    kept: list[str] = []
    tail = ""
    for paragraph in text.split("\n\n"):
        # Judged together with the end of what is kept: a run may cross the seam between paragraphs.
        joined = f"{tail} {paragraph}"
        if seen.isdisjoint(ngram_hashes(joined)):
            kept.append(paragraph)
            tail = joined[-_SEAM_CHARS:]
    return "\n\n".join(kept)
