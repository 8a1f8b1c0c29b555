"""Which prefixes a directory holds, what they weigh, which blocks are in use. Reads headers only; restores nothing."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.errors import CacheError
from pqkv_cli.files import is_temporary, remove_left_behind
from pqkv_cli.runtime.prefix_blocks import block_file
from pqkv_cli.runtime.prefix_files import OtherVersionError, PrefixHeader, peek_header

TRIES = 3  # of reading a prefix that is replaced meanwhile
_END = ".safetensors"
_BLOCK = re.compile(r"([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """A prefix in a store.

    Attributes
    ----------
    key
        Its name.
    header
        What its file says: whose it is, its tokens, its page table.
    last_used
        When it was stored or last restored, in seconds since 1970.
    num_bytes
        Bytes of its file and of all its blocks.
    own_bytes
        Those of them that no other prefix needs: what removing it would free.
    """

    key: str
    header: PrefixHeader
    last_used: float
    num_bytes: int
    own_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.header.tokens)


@dataclass(frozen=True, slots=True)
class Entry:
    """The file of a prefix and the header at its beginning."""

    path: Path
    header: PrefixHeader
    file_bytes: int
    last_used_ns: int

    @property
    def key(self) -> str:
        """The name of the prefix."""
        return self.path.name.removesuffix(_END)

    def usable(self, ids: Sequence[int]) -> int:
        """Return how many tokens of the text `ids` the prefix can stand for, all but the last at most; 0 if it cannot."""
        tokens, shortest = self.header.tokens, self.header.shape.shortest
        if len(ids) <= shortest or tuple(ids[:shortest]) != tokens[:shortest]:
            return 0
        most = min(len(tokens), len(ids) - 1)
        if tuple(ids[:most]) == tokens[:most]:
            return most
        return next(i for i in range(shortest, most) if ids[i] != tokens[i])


class PrefixIndex:
    """The files of a store.

    Parameters
    ----------
    directory
        Holds the files of prefixes; their blocks lie in a directory in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.blocks = directory, directory / "blocks"
        self._known: dict[str, tuple[tuple[int, int, int], PrefixHeader]] = {}

    def file(self, key: str) -> Path:
        """Return where the prefix called `key` lies."""
        return self.directory / f"{key}{_END}"

    def stamp(self, key: str) -> tuple[int, int, int] | None:
        """Return what changes when the file of a prefix is replaced; None where there is none."""
        try:
            return _stamp(self.file(key).stat())
        except FileNotFoundError:
            return None

    def stored_keys(self) -> tuple[str, ...]:
        """Return the names of all prefixes, damaged ones too."""
        try:
            paths = sorted(self.directory.iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise CacheError(f"{self.directory} cannot be read: {error}; expected a directory of stored prefixes") from error
        return tuple(path.name.removesuffix(_END) for path in paths if path.name.endswith(_END) and not is_temporary(path))

    def scan(self) -> tuple[tuple[Entry, ...], dict[str, CacheError]]:
        """Return all prefixes, and why others cannot be read, by name."""
        entries, faults = [], {}
        for key in self.stored_keys():
            try:
                entries.append(self._entry(self.file(key)))
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError as error:
                faults[key] = CacheError(f"its file cannot be read: {error}")
            except CacheError as error:
                faults[key] = error
        return tuple(entries), faults

    def _entry(self, path: Path) -> Entry:
        facts = path.stat()
        stamp = _stamp(facts)
        known = self._known.get(path.name)
        if known is None or known[0] != stamp:
            known = self._known[path.name] = stamp, peek_header(path)
        return Entry(path, known[1], facts.st_size, facts.st_mtime_ns)

    def stored(self, entries: Iterable[Entry]) -> tuple[StoredPrefix, ...]:
        """Return `entries` with what they weigh, the last used first."""
        entries = sorted(entries, key=lambda entry: (-entry.last_used_ns, entry.key))
        uses = Counter(sha256 for entry in entries for sha256 in _blocks(entry))
        sizes = {sha256: self._size(sha256) for sha256 in uses}
        found = []
        for entry in entries:
            blocks = _blocks(entry)
            own = sum(sizes[each] for each in blocks if uses[each] == 1)
            whole = entry.file_bytes + sum(sizes[each] for each in blocks)
            found.append(StoredPrefix(entry.key, entry.header, entry.last_used_ns / 1e9, whole, entry.file_bytes + own))
        return tuple(found)

    def total_bytes(self, entries: Iterable[Entry]) -> int:
        """Return the bytes of `entries` and of all their blocks, each counted once."""
        entries = tuple(entries)
        blocks = {sha256 for entry in entries for sha256 in _blocks(entry)}
        return sum(entry.file_bytes for entry in entries) + sum(map(self._size, blocks))

    def remove(self, keys: Collection[str]) -> None:
        """Remove prefixes, then all blocks that no other needs, and what killed writers have left.

        Which blocks are needed follows from the files that are there, so a removal that was killed is made good by the next.

        Raises
        ------
        CacheError
            If a file cannot be removed, or one is of another version, whose blocks are not known.
        """
        self.require_known(keys)
        entries, _ = self.scan()
        needed = {sha256 for entry in entries if entry.key not in keys for sha256 in _blocks(entry)}
        try:
            for key in keys:
                self.file(key).unlink(missing_ok=True)
            for path in list(self.blocks.iterdir()) if self.blocks.is_dir() else []:
                found = _BLOCK.fullmatch(path.name)
                if found is not None and found[1] not in needed:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(
                f"{self.directory} cannot be changed: {error}; expected to be allowed to: fix the rights"
            ) from error
        for directory in (self.directory, self.blocks):
            remove_left_behind(directory)

    def prune(self, max_bytes: int | None, max_age: float | None, keep: str = "") -> tuple[StoredPrefix, ...]:
        """Remove what is over the limits, but never the prefix `keep`, and return it.

        First goes what nobody used for `max_age` seconds, then what was not used for longest until all weighs at most
        `max_bytes`. Blocks that nobody needs go in any case.
        """
        entries = sorted(self.scan()[0], key=lambda entry: (entry.last_used_ns, entry.key))
        oldest = -math.inf if max_age is None else (time.time() - max_age) * 1e9
        gone = [entry for entry in entries if entry.last_used_ns < oldest and entry.key != keep]
        left = [entry for entry in entries if entry.last_used_ns >= oldest or entry.key == keep]
        uses = Counter(sha256 for entry in left for sha256 in _blocks(entry))
        weight = self.total_bytes(left)
        for entry in left:
            if max_bytes is None or weight <= max_bytes:
                break
            if entry.key == keep:
                continue
            uses.subtract(_blocks(entry))
            weight -= entry.file_bytes + sum(self._size(sha256) for sha256 in _blocks(entry) if not uses[sha256])
            gone.append(entry)
        stored = {each.key: each for each in self.stored(entries)}
        self.remove({entry.key for entry in gone})
        return tuple(stored[entry.key] for entry in gone)

    def require_known(self, but: Collection[str] = ()) -> None:
        """Refuse to change a store with prefixes of another version, whose blocks are not known, all `but` some of them.

        Raises
        ------
        CacheError
            If there is one.
        """
        for key, fault in self.scan()[1].items():
            if isinstance(fault, OtherVersionError) and key not in but:
                raise CacheError(f"{self.file(key)}: {fault}; nothing was changed, because its blocks are not known")

    def touch(self, entry: Entry) -> None:
        """Note that a prefix was used just now, where files may be changed."""
        with suppress(OSError):
            os.utime(entry.path)

    def _size(self, sha256: str) -> int:
        try:
            return block_file(self.blocks, sha256).stat().st_size
        except OSError:  # missing: it weighs nothing, and reading the prefix says so
            return 0


def _stamp(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _blocks(entry: Entry) -> set[str]:
    return {sha256 for sha256, _ in entry.header.blocks}
