"""The file of a stored prefix: a header and the tensors that it does not share, in safetensors. Knows no models.

Every byte counts: the head begins with the SHA-256 of the whole file, taken with zeros in its own place.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.cache.one_row import RowShape
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.layer_state import Facts
from pqkv_cli.runtime.prefix_owner import PrefixOwner

FORMAT, VERSION = "pqkv-prefix", 1
_LENGTH_BYTES = 8
_MAX_HEAD_BYTES = 1 << 28
_ALIGNED = 64
_OPENING = '{"__metadata__":{"sha256":"'
_NO_DIGEST = "0" * 64
_DIGEST = slice(_LENGTH_BYTES + len(_OPENING), _LENGTH_BYTES + len(_OPENING) + len(_NO_DIGEST))
_TEXT_KEY = "pqkv_prefix"
_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {word: dtype for dtype, word in _WORDS.items()}
AGAIN = "remove it with `pqkv prefix remove` and store it again"


@dataclass(frozen=True, slots=True)
class PrefixHeader:
    """What the file of a prefix says.

    Attributes
    ----------
    owner, tokens
        Whose it is; its token ids.
    shape
        How its tokens are held.
    others
        Of each layer without codes its class and facts, None where there are codes.
    blocks
        The page table: the SHA-256 of each block's file, and how many pages it holds.
    created
        When it was stored, in seconds since 1970.
    pqkv_version
        Who stored it.
    """

    owner: PrefixOwner
    tokens: tuple[int, ...]
    shape: RowShape
    others: tuple[tuple[str, Facts] | None, ...]
    blocks: tuple[tuple[str, int], ...]
    created: int
    pqkv_version: str

    @property
    def key(self) -> str:
        """The name of the prefix: the same tokens of the same owner have the same."""
        facts = json.dumps([self.owner.without_tokenizer(), self.tokens], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


class OtherVersionError(CacheError):
    """A file of another version of the format: whole, but not for this pqkv."""


def header_text(header: PrefixHeader) -> str:
    """Return `header` as JSON."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "owner": asdict(header.owner),
        "tokens": header.tokens,
        "shape": asdict(header.shape),
        "others": header.others,
        "blocks": header.blocks,
        "created": header.created,
        "pqkv_version": header.pqkv_version,
    }
    return json.dumps(document, separators=(",", ":"))


def parse_header(text: str) -> PrefixHeader:
    """Return the header that the JSON `text` holds.

    Raises
    ------
    OtherVersionError
        If it is of another version.
    CacheError
        If it is none.
    """
    try:
        document = json.loads(text)
        found = document.pop("format"), document.pop("version")
        if found[0] == FORMAT and found[1] != VERSION:
            raise OtherVersionError(
                f"it is of version {str(found[1])[:20]}; this pqkv reads version {VERSION}: use the pqkv that wrote it, or "
                "another directory"
            )
        if found[0] != FORMAT:
            raise ValueError(f"its format is {str(found[0])[:40]!r}")
        return _header(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"its header cannot be read ({str(error)[:200]}); expected that of a stored prefix: {AGAIN}"
        ) from error


def _header(document: dict[str, Any]) -> PrefixHeader:
    tokens = document["tokens"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens are no list of integers")
    shape = document["shape"]
    return PrefixHeader(
        owner=PrefixOwner(**document["owner"]),
        tokens=tuple(tokens),
        shape=RowShape(**{**shape, "block_pages": tuple(shape["block_pages"])}),
        others=tuple(None if each is None else (str(each[0]), dict(each[1])) for each in document["others"]),
        blocks=tuple((str(sha256), int(pages)) for sha256, pages in document["blocks"]),
        created=int(document["created"]),
        pqkv_version=str(document["pqkv_version"]),
    )


def packed(text: str, tensors: Mapping[str, torch.Tensor]) -> bytearray:
    """Return the content of a file with the header `text` and `tensors`.

    Raises
    ------
    CacheError
        If safetensors has no word for a tensor's type.
    """
    entries, parts, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # aligned without gaps
        if tensor.dtype not in _WORDS:
            raise CacheError(
                f"a cache layer of this model holds {tensor.dtype} ({name}); expected a type that safetensors knows: keep this "
                "model's caches in memory"
            )
        parts.append(plain_bytes(tensor))
        entries[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    head = head_bytes({"__metadata__": {"sha256": _NO_DIGEST, _TEXT_KEY: text}, **entries})
    data = bytearray(b"").join([head, *parts])
    data[_DIGEST] = hashlib.sha256(data).hexdigest().encode()
    return data


def head_bytes(document: dict[str, Any]) -> bytes:
    """Return what stands before the tensors of a safetensors file: length and JSON, padded so that tensors lie aligned."""
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNED)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def plain_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of `tensor`, in its own memory where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_digest(data: bytearray) -> None:
    """Refuse the content of a file of which any byte is another than was written.

    Raises
    ------
    CacheError
        If one is.
    """
    view, claimed = memoryview(data), bytes(data[_DIGEST])
    digest = hashlib.sha256(view[: _DIGEST.start])
    digest.update(_NO_DIGEST.encode())
    digest.update(view[_DIGEST.stop :])
    found = digest.hexdigest()
    if found.encode() != claimed:
        raise CacheError(
            f"its SHA-256 is {found[:12]}, the file says {claimed[:12].decode('ascii', 'replace')!a}; expected the same, it "
            f"was cut off or damaged: {AGAIN}"
        )


@contextmanager
def checked_meanwhile(data: bytearray) -> Iterator[None]:
    """Check `data` in a thread while the block works with it; damage is refused as in `check_digest`, whatever it raises.

    Nothing that the block makes may be used before it has ended.
    """
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_digest, data)
        try:
            yield
        finally:
            check.result()


def unpacked(data: bytearray, key: str) -> tuple[PrefixHeader, dict[str, torch.Tensor]]:
    """Return header and tensors of the content of the file of the prefix called `key`; the tensors lie in `data`.

    Raises
    ------
    CacheError
        If it is another prefix's.
    """
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    document = json.loads(data[_LENGTH_BYTES:start])
    header = parse_header(document.pop("__metadata__")[_TEXT_KEY])
    if header.key != key or sum(count for _, count in header.blocks) != header.shape.num_pages:
        raise CacheError(f"its file is called {key} and holds the prefix {header.key}; expected the same: {AGAIN}")
    return header, {name: _tensor(data, start, entry) for name, entry in document.items()}


def _tensor(data: bytearray, start: int, entry: Mapping[str, Any]) -> torch.Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=start + entry["data_offsets"][0]).reshape(shape)


def read_file(path: Path) -> bytearray:
    """Return the content of a file.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with path.open("rb", buffering=0) as stream:
        data = bytearray(stream.seek(0, 2))
        stream.seek(0)
        view, done = memoryview(data), 0
        while done < len(data) and (step := stream.readinto(view[done:])):
            done += step
        view.release()
        del data[done:]
    return data


def read_prefix(path: Path, key: str) -> tuple[PrefixHeader, dict[str, torch.Tensor]]:
    """Return header and tensors of the file of the prefix called `key`, of which every byte is as it was written.

    Raises
    ------
    CacheError
        If it is damaged or another prefix's.
    OSError
        If it cannot be read.
    """
    data = read_file(path)
    check_digest(data)
    return unpacked(data, key)


def peek_header(path: Path) -> PrefixHeader:
    """Return the header of a file without reading its tensors, so without knowing that it is whole.

    Raises
    ------
    OtherVersionError
        If it is of another version.
    CacheError
        If it is none.
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        text = stream.read(length) if length <= _MAX_HEAD_BYTES else b""
    try:
        found = json.loads(text)["__metadata__"][_TEXT_KEY]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(f"it has no header of a stored prefix; expected one at its beginning: {AGAIN}") from error
    return parse_header(found)
