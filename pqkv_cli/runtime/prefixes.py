"""Caches of texts that were read once, kept in a directory: stored, found again by their token ids, restored whole.

    store = PrefixStore("prefixes")
    store.save(attached, cache, token_ids)
    cache, num_tokens = store.longest_prefix(attached, token_ids)
    model.generate(ids, cache=cache)

The last line reads only the tokens behind the first `num_tokens`.
"""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pqkv_cli import __version__
from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.one_row import HeldRow, put_row, take_row
from pqkv_cli.errors import CacheError, UsageError, did_you_mean
from pqkv_cli.files import turn, write_bytes
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.prefix_blocks import (
    PageSpec,
    block_ranges,
    missing_block,
    packed_blocks,
    read_blocks,
    write_block,
)
from pqkv_cli.runtime.prefix_check import prefix_faults
from pqkv_cli.runtime.prefix_files import AGAIN, PrefixHeader, checked_meanwhile, header_text, packed, read_file, unpacked
from pqkv_cli.runtime.prefix_index import TRIES, Entry, PrefixIndex, StoredPrefix
from pqkv_cli.runtime.prefix_owner import PrefixOwner, owner_of
from pqkv_cli.specs import SIDES


class PrefixWarning(UserWarning):
    """A stored prefix would have served a text, and cannot."""


class Restored(NamedTuple):
    """A cache, and how many of a text's tokens it holds: 0 if nothing that is stored serves it."""

    cache: QuantizedCache
    num_tokens: int


class _Gone(Exception):
    """The prefix was removed while it was read."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """Who wants to use a prefix."""

    attached: Attached
    owner: PrefixOwner


class PrefixStore:
    """Prefixes in a directory, of any number of models. Several processes may use it at once.

    Parameters
    ----------
    directory
        Made when the first prefix is stored.
    max_bytes
        What the directory may weigh: `save` removes the prefixes that were not used for longest.
    max_age
        Seconds after which a prefix that nobody used is removed by the next `save`.

    Raises
    ------
    UsageError
        If a limit is not positive.
    """

    def __init__(self, directory: Path | str, max_bytes: int | None = None, max_age: float | None = None) -> None:
        for name, limit in (("max_bytes", max_bytes), ("max_age", max_age)):
            if limit is not None and not 0 < limit < math.inf:
                raise UsageError(f"{name} is {limit}; expected a positive number, or None for no limit")
        self.directory = Path(directory).expanduser()
        self.max_bytes, self.max_age = max_bytes, max_age
        self._index = PrefixIndex(self.directory)

    def save(
        self, attached: Attached, cache: QuantizedCache, token_ids: Any, *, row: int = 0, tokenizer: Any = None
    ) -> StoredPrefix:
        """Store one row of `cache`, which has read `token_ids`; a prefix of the same tokens is replaced.

        Blocks of pages that other prefixes have already are shared with them. Then the limits of the store are kept.

        Parameters
        ----------
        attached
            Whose cache it is.
        token_ids
            One id for every token that the cache holds: a sequence, or a tensor [T] or [1, T].
        row
            Which row of the batch; it must have no padding.
        tokenizer
            If given, the prefix is refused to those who give another.

        Raises
        ------
        CacheError
            If the cache is another model's or is not that of `token_ids`, the row cannot be taken, the disk is full, or the
            prefix alone is more than the store may weigh. Nothing is stored then.
        """
        cache.check_owner(attached.model.base_model)
        ids, held = _ids(token_ids), take_row(cache, row)
        if len(ids) != held.shape.num_slots:
            raise CacheError(
                f"the cache holds {held.shape.num_slots} tokens and {len(ids)} ids are given; expected one for each: "
                "generate() returns one token more than the cache has read, so leave out the last"
            )
        self._check_weight(held)
        specs = _specs(cache)
        with self._turn():
            self._index.require_known()
            try:
                table = []
                for sha256, data in packed_blocks(held.pages, specs, held.shape.num_pages):
                    write_block(self._index.blocks, sha256, data)
                    table.append(sha256)
                header = _header(owner_of(attached, tokenizer), ids, held, table)
                write_bytes(self._index.file(header.key), packed(header_text(header), held.exact), CacheError)
            except BaseException:
                with suppress(CacheError):
                    self._index.remove(())  # blocks that nobody needs now
                raise
            self._index.prune(self.max_bytes, self.max_age, keep=header.key)
            return self.find(header.key)

    def longest_prefix(self, attached: Attached, token_ids: Any, *, tokenizer: Any = None) -> Restored:
        """Return a new cache that holds as many of the first `token_ids` as stored prefixes can give, never all of them.

        The last token is left to be read, because its logits are needed. So ``model.generate`` with all ids and this cache
        reads what is missing and goes on. Where nothing serves, the cache is empty.

        Warns with `PrefixWarning` of every prefix that would have served longer and cannot: because it is another model's, or
        damaged.
        """
        ids, reader = _ids(token_ids), _Reader(attached, owner_of(attached, tokenizer))
        entries, faults = self._index.scan()
        for key, fault in faults.items():
            _warn(self._index.file(key), fault)
        serving = [(entry.usable(ids), entry) for entry in entries]
        # The longest first, and among equals those that can be used.
        order = [(-count, len(entry.header.owner.differences(reader.owner)), entry.key) for count, entry in serving]
        for _, (count, entry) in sorted(zip(order, serving, strict=True), key=lambda pair: pair[0]):
            if not count:
                break
            try:
                return Restored(self._restored(reader, entry, count, ids), count)
            except _Gone:
                continue
            except CacheError as error:
                _warn(entry.path, error)
        return Restored(attached.new_cache(), 0)

    def load(self, attached: Attached, key: str, *, tokenizer: Any = None) -> QuantizedCache:
        """Return a new cache that holds all tokens of the prefix called `key`.

        Raises
        ------
        CacheError
            If there is none, it is damaged, or it belongs to another model, artifact, tokenizer or setting.
        """
        entry = self._entry(key)
        try:
            reader = _Reader(attached, owner_of(attached, tokenizer))
            return self._restored(reader, entry, len(entry.header.tokens), entry.header.tokens)
        except (CacheError, _Gone) as error:
            raise CacheError(f"{entry.path}: {error or 'it was removed just now'}") from error

    def list(self) -> tuple[StoredPrefix, ...]:
        """Return all prefixes that can be read, the last used first."""
        return self._index.stored(self._index.scan()[0])

    def find(self, key: str) -> StoredPrefix:
        """Return the prefix called `key`, of which the beginning is enough where only one has it.

        Raises
        ------
        CacheError
            If there is none, or its header is damaged.
        """
        whole = self._entry(key).key
        return next(each for each in self.list() if each.key == whole)

    def num_bytes(self) -> int:
        """Return the bytes of all prefixes and of their blocks."""
        return self._index.total_bytes(self._index.scan()[0])

    def remove(self, *keys: str) -> None:
        """Remove prefixes, damaged ones too, and the blocks that no other prefix needs.

        Raises
        ------
        CacheError
            If there is none of a name; nothing is removed then.
        """
        whole = [self.find_key(key) for key in keys]
        with self._turn():
            self._index.remove(whole)

    def prune(self, max_bytes: int | None = None, max_age: float | None = None) -> tuple[StoredPrefix, ...]:
        """Keep limits, the store's own where none are given, and return what was removed for them.

        First goes what nobody used for `max_age` seconds, then what was not used for longest until all weighs at most
        `max_bytes`. What killed writers have left is removed, too.
        """
        if not self.directory.is_dir():
            return ()
        with self._turn():
            return self._index.prune(
                self.max_bytes if max_bytes is None else max_bytes, self.max_age if max_age is None else max_age
            )

    def verify(self) -> tuple[tuple[str, str], ...]:
        """Read every byte of every prefix and return what is wrong, as pairs of a name and a sentence."""
        return prefix_faults(self._index)

    def _restored(self, reader: _Reader, entry: Entry, num_tokens: int, ids: Sequence[int]) -> QuantizedCache:
        """Return a cache with the first `num_tokens` of a prefix, which must be `ids`; it is whole, or nobody sees it."""
        for _ in range(TRIES):
            before = self._index.stamp(entry.key)
            try:
                data = read_file(entry.path)
                with checked_meanwhile(data):
                    header, exact = unpacked(data, entry.key)
                    _require_same(header, reader.owner, ids[:num_tokens])
                    made = self._filled(reader.attached, header, exact, num_tokens)
            except FileNotFoundError as error:
                now = self._index.stamp(entry.key)
                if now is None:
                    raise _Gone from error
                if now == before:
                    raise missing_block(Path(str(error.filename)).stem) from error
                continue  # it was replaced, and its former blocks are gone
            except OSError as error:
                raise CacheError(f"it cannot be read: {error}; expected to be allowed to: {AGAIN}") from error
            self._index.touch(entry)
            return made
        raise _Gone

    def _filled(
        self, attached: Attached, header: PrefixHeader, exact: dict[str, torch.Tensor], num_tokens: int
    ) -> QuantizedCache:
        cache, model = attached.new_cache(), attached.model
        is_spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        modules = attention_modules(model) if is_spread else {}  # layers on several devices keep their tokens there
        if len(cache.layers) != len(header.others):
            raise CacheError(
                f"it has {len(header.others)} cache layers, this model {len(cache.layers)}; expected the same: use the version "
                "of transformers that stored it, or store it again"
            )

        def device_of(index: int) -> torch.device:
            own = next(modules[index].parameters(), None) if index in modules else None
            return torch.device(model.device) if own is None or own.device.type == "meta" else own.device

        room = put_row(cache, HeldRow(header.shape, exact, header.others, ()), num_tokens, device_of)
        num_pages = sum(len(part) for part in room[0])
        read_blocks(self._index.blocks, header.blocks, _specs(cache), room, num_pages)
        return cache

    def _check_weight(self, held: HeldRow) -> None:
        weight = sum(tensor.nbytes for tensor in held.exact.values())
        weight += sum(part.nbytes for parts in held.pages for part in parts)
        if self.max_bytes is not None and weight > self.max_bytes:
            raise CacheError(
                f"the prefix weighs {weight} bytes and the store may weigh {self.max_bytes}; expected less: allow more with "
                "max_bytes, or store a shorter text"
            )

    def find_key(self, key: str) -> str:
        """Return the name of the one prefix, damaged or not, that is called `key` or whose name begins so.

        Raises
        ------
        CacheError
            If there is none, or there are several.
        """
        keys = self._index.stored_keys()
        found = [each for each in keys if each == key] or [each for each in keys if key and each.startswith(key)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CacheError(
                f"{len(found)} prefixes in {self.directory} begin with {key!r}; expected one: give more of its name"
            )
        raise CacheError(
            f"there is no prefix {key!r} in {self.directory}{did_you_mean(key, keys)}; expected one of {len(keys)}: see "
            f"them with `pqkv prefix list --store {self.directory}`"
        )

    def _entry(self, key: str) -> Entry:
        whole = self.find_key(key)
        entries, faults = self._index.scan()
        if whole in faults:
            raise CacheError(f"{self._index.file(whole)}: {faults[whole]}")
        return next(entry for entry in entries if entry.key == whole)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one process at a time change the store; readers need no turn."""
        try:
            with turn(self.directory / ".lock"):
                yield
        except OSError as error:
            raise CacheError(
                f"{self.directory} cannot be changed: {error}; expected a directory to write to: choose another place"
            ) from error


def _require_same(header: PrefixHeader, owner: PrefixOwner, ids: Sequence[int]) -> None:
    """Refuse a prefix of another owner, or one that does not begin with `ids`."""
    if differences := header.owner.differences(owner):
        raise CacheError("; ".join(differences))
    if tuple(ids) != header.tokens[: len(ids)]:
        raise CacheError(f"its tokens are not those of the text; expected the same: {AGAIN}")


def _header(owner: PrefixOwner, ids: Sequence[int], held: HeldRow, table: Sequence[str]) -> PrefixHeader:
    ranges = block_ranges(held.shape.num_pages)
    blocks = tuple((sha256, stop - start) for sha256, (start, stop) in zip(table, ranges, strict=True))
    return PrefixHeader(owner, tuple(ids), held.shape, held.others, blocks, int(time.time()), __version__)


def _specs(cache: QuantizedCache) -> tuple[PageSpec, ...]:
    return tuple(
        PageSpec(f"layers.{index}.{side}", layer.tables[side].num_heads, layer.tables[side].layout.page_bytes)
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, QuantizedLayer)
        for side in SIDES
    )


def _ids(token_ids: Any) -> tuple[int, ...]:
    if isinstance(token_ids, torch.Tensor):
        if token_ids.ndim > 2 or (token_ids.ndim == 2 and len(token_ids) != 1):
            raise UsageError(
                f"token_ids have the shape {list(token_ids.shape)}; expected those of one row: choose it, as token_ids[row]"
            )
        token_ids = token_ids.reshape(-1).tolist()
    return tuple(int(token) for token in token_ids)


def _warn(path: Path, error: CacheError) -> None:
    warnings.warn(f"the stored prefix {path} is not used: {error}", PrefixWarning, stacklevel=4)
