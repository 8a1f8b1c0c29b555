"""Reads every byte of a store's prefixes and says what is wrong. Restores nothing, changes nothing."""

from pqkv_cli.errors import CacheError
from pqkv_cli.runtime.prefix_blocks import block_file, check_block, missing_block
from pqkv_cli.runtime.prefix_files import AGAIN, read_prefix
from pqkv_cli.runtime.prefix_index import TRIES, PrefixIndex


def prefix_faults(index: PrefixIndex) -> tuple[tuple[str, str], ...]:
    """Return the name of every prefix that is not whole, and a sentence on what is wrong with it."""
    sound: set[str] = set()
    found = {key: _fault(index, key, sound) for key in index.stored_keys()}
    return tuple((key, fault) for key, fault in found.items() if fault is not None)


def _fault(index: PrefixIndex, key: str, sound: set[str]) -> str | None:
    """Return what is wrong with a prefix; nothing is with one that was removed or replaced meanwhile."""
    fault: str | None = None
    for _ in range(TRIES):
        before = index.stamp(key)
        try:
            _check(index, key, sound)
            return None
        except CacheError as error:
            fault = str(error)
        except OSError as error:
            fault = f"it cannot be read: {error}; expected to be allowed to: {AGAIN}"
        if index.stamp(key) == before:
            break
    return fault if index.stamp(key) is not None else None


def _check(index: PrefixIndex, key: str, sound: set[str]) -> None:
    header, _ = read_prefix(index.file(key), key)
    for sha256, _ in header.blocks:
        if sha256 in sound:
            continue
        path = block_file(index.blocks, sha256)
        if not path.exists():
            raise missing_block(sha256)
        check_block(path, sha256)
        sound.add(sha256)
