"""Blocks of pages on disk, which prefixes share: named by what they hold, written once, checked at every reading.

A block is a safetensors file with some pages of all layers with codes; its name is the SHA-256 of all its bytes. So two
prefixes with the same codes have the same blocks, and which of them are in use follows from the files of prefixes that are
there: no count is kept that could be wrong.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pqkv_cli.cache.one_row import PageParts
from pqkv_cli.errors import CacheError
from pqkv_cli.files import write_bytes
from pqkv_cli.runtime.prefix_files import AGAIN, head_bytes, plain_bytes, read_file

BLOCK_PAGES = 4
_THREADS = 4


@dataclass(frozen=True, slots=True)
class PageSpec:
    """One side of one layer: the name of its tensor, and the bytes of one of its pages, all heads together."""

    name: str
    num_heads: int
    page_bytes: int


def block_ranges(num_pages: int) -> list[tuple[int, int]]:
    """Return first page and the one behind the last of every block of `num_pages`; the last block may be shorter."""
    return [(start, min(start + BLOCK_PAGES, num_pages)) for start in range(0, num_pages, BLOCK_PAGES)]


def block_file(directory: Path, sha256: str) -> Path:
    """Return where the block lies whose bytes have this hash."""
    return directory / f"{sha256}.safetensors"


def packed_blocks(pages: Sequence[PageParts], specs: Sequence[PageSpec], num_pages: int) -> Iterator[tuple[str, bytes]]:
    """Yield hash and content of every block of the first `num_pages` of `pages`."""
    memory = [[plain_bytes(part) for part in parts] for parts in pages]
    for start, stop in block_ranges(num_pages):
        parts: list[bytes | memoryview] = [_head(specs, stop - start)]
        for views, spec in zip(memory, specs, strict=True):
            parts += _spans(views, spec, start, stop)
        data = b"".join(parts)
        yield hashlib.sha256(data).hexdigest(), data


def write_block(directory: Path, sha256: str, data: bytes) -> None:
    """Write a block unless it is there already, whole.

    Raises
    ------
    CacheError
        If it cannot be written.
    """
    path = block_file(directory, sha256)
    try:
        if path.stat().st_size == len(data) and read_file(path) == data:
            return
    except OSError:  # not there, or not to be read: written anew
        pass
    write_bytes(path, data, CacheError)


def read_blocks(
    directory: Path, table: Sequence[tuple[str, int]], specs: Sequence[PageSpec], room: Sequence[PageParts], num_pages: int
) -> None:
    """Read the first `num_pages` of the blocks in `table` into `room`, and check every byte of them.

    Raises
    ------
    CacheError
        If a block is not what its name says.
    FileNotFoundError
        If a block is missing.
    OSError
        If one cannot be read.
    """
    host = [tuple(p if p.device.type == "cpu" else torch.empty(p.shape, dtype=p.dtype) for p in parts) for parts in room]
    memory = [[plain_bytes(part) for part in parts] for parts in host]
    jobs, start = [], 0
    for sha256, count in table:
        if start >= num_pages:
            break
        jobs.append((sha256, count, start))
        start += count

    page_bytes = sum(spec.num_heads * spec.page_bytes for spec in specs)
    heads = {count: _head(specs, count) for _, count, _ in jobs}

    def read(job: tuple[str, int, int]) -> None:
        sha256, count, first = job
        content, head = _checked(block_file(directory, sha256), sha256), heads[count]
        if content[: len(head)] != head or len(content) != len(head) + count * page_bytes:
            raise CacheError(f"its block {sha256[:12]} holds other pages than its page table says; expected the same: {AGAIN}")
        begin = len(head)
        for own, spec in zip(memory, specs, strict=True):
            done = begin
            for span in _spans(own, spec, first, min(first + count, num_pages)):
                span[:] = content[done : done + len(span)]
                done += len(span)
            begin += count * spec.num_heads * spec.page_bytes

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(read, jobs))
    for there, here in zip((p for parts in room for p in parts), (p for parts in host for p in parts), strict=True):
        if there is not here:
            there.copy_(here)


def check_block(path: Path, sha256: str) -> None:
    """Refuse a block that is not what its name says; as `read_blocks`."""
    _checked(path, sha256)


def _checked(path: Path, sha256: str) -> memoryview:
    """Return the content of a block, of which every byte is as it was written."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CacheError(f"its block {sha256[:12]} has the SHA-256 {found[:12]}; expected its name, it was damaged: {AGAIN}")
    return memoryview(content)


def missing_block(sha256: str) -> CacheError:
    """Return what to raise where a block is not there."""
    return CacheError(f"its block {sha256[:12]} is missing; expected all of them: {AGAIN}")


def _head(specs: Sequence[PageSpec], num_pages: int) -> bytes:
    entries, end = {}, 0
    for spec in specs:
        size = num_pages * spec.num_heads * spec.page_bytes
        entries[spec.name] = {
            "dtype": "U8",
            "shape": [num_pages, spec.num_heads, spec.page_bytes],
            "data_offsets": [end, end + size],
        }
        end += size
    return head_bytes({"__metadata__": {"pqkv_block": "1"}, **entries})


def _spans(views: Sequence[memoryview], spec: PageSpec, start: int, stop: int) -> list[memoryview]:
    """Return the memory of the pages ``start:stop``, which lie in `views` one after the other."""
    spans, first, size = [], 0, spec.num_heads * spec.page_bytes
    for view in views:
        last = first + len(view) // size
        low, high = max(start, first), min(stop, last)
        if low < high:
            spans.append(view[(low - first) * size : (high - first) * size])
        first = last
    return spans
