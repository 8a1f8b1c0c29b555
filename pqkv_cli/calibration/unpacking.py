"""Unpacks compressed files, and names those that are no text at all. Knows bytes; no rows, no texts."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from pqkv_cli.errors import DataError

PACKED_ENDS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")
# What files of other forms begin with, what they are, and the way out.
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or an office document)", "Unpack it, and name the folder or a text file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, and name the folder or a text file"),
    (b"Rar!", "a rar archive", "Unpack it, and name the folder or a text file"),
    (b"%PDF-", "a PDF document", "Convert it to text, for example with pdftotext"),
    (b"ARROW1", "an Arrow file", "Write it as Parquet or JSON lines"),
    (b"\xff\xff\xff\xff", "an Arrow stream (or other binary data)", "Write it as Parquet or JSON lines"),
    (b"Obj\x01", "an Avro file", "Write it as Parquet or JSON lines"),
    (b"ORC", "an ORC file", "Write it as Parquet or JSON lines"),
    (b"SQLite format 3\x00", "an SQLite data base", "Write the table as CSV or JSON lines"),
    (b"\x89HDF", "an HDF5 file", "Write it as Parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "Write it as UTF-8 text"),
    (b"GGUF", "a model in GGUF", "Name a text file"),
    (b"version https://git-lfs.github.com/spec/", "a pointer of git-lfs", "Fetch the file itself with 'git lfs pull'"),
    (b"\x1f\x9d", "compressed with compress", "Unpack it with uncompress"),
)


def unpacked(raw: bytes, path: Path, where: str) -> bytes:
    """Return what `raw`, the bytes of `path`, holds once it is unpacked; itself where it is not packed.

    Raises
    ------
    DataError
        If it is damaged, cannot be unpacked here, or is of a form that holds no text.
    """
    for magic, (name, unpack) in _PACKED.items():
        if raw.startswith(magic):
            raw = _opened(raw, name, unpack, path, where)
            break
    for magic, what, way in _REFUSED:
        if raw.startswith(magic) and not (magic == b"ORC" and path.suffix.lower() != ".orc"):
            raise DataError(f"{where} is {what}; expected UTF-8 text, JSON lines, JSON, CSV or Parquet. {way}.")
    if raw[257:262] == b"ustar":
        raise DataError(f"{where} is a tar archive; expected UTF-8 text or rows. Unpack it, and name the folder or a file.")
    return raw


def _opened(raw: bytes, name: str, unpack: Callable[[bytes], bytes], path: Path, where: str) -> bytes:
    try:
        return unpack(raw)
    except ImportError as error:
        raise DataError(
            f"{where} is compressed with {name}, and nothing here unpacks that: pip install pyarrow, or {name} -d {path}"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{where} is compressed with {name} and damaged ({error}); expected the whole file. Copy it again, or unpack it."
        ) from error


def _by_arrow(compression: str) -> Callable[[bytes], bytes]:
    def unpack(raw: bytes) -> bytes:
        found: bytes = import_module("pyarrow").input_stream(io.BytesIO(raw), compression=compression).read()
        return found

    return unpack


_PACKED: Mapping[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
    b"\x5d\x00\x00": ("lzma", lzma.decompress),
    b"\x28\xb5\x2f\xfd": ("zstd", _by_arrow("zstd")),
    b"\x04\x22\x4d\x18": ("lz4", _by_arrow("lz4")),
}
