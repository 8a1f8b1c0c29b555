"""The head of a GGUF file: what it says of itself, and where its tensors lie. Knows the format; reads no weights.

Only this is looked at to refuse a file, to tell it from another one, and to find the conversion that was made of it.
"""

import hashlib
import importlib.util
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from pqkv_cli.errors import ModelError

MAGIC = b"GGUF"
FLOAT32 = 0
# Types of tensors that are no blocks, and what a number of theirs is called in torch.
PLAIN_TYPES = {FLOAT32: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32
_SAMPLE_BYTES = 4096
AGAIN = "Copy or download it again."


class _CutShortError(Exception):
    """The file ends where more was announced."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its name, shape (innermost dimension first, as the file has it), type and first byte."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    begin: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`facts` are the file's keys with single values, of an array its length; `num_bytes` is where the tensors begin."""

    facts: dict[str, object]
    tensors: tuple[GgufTensor, ...]
    num_bytes: int

    @property
    def architecture(self) -> str:
        """The name of the kind of model."""
        return str(self.facts["general.architecture"])

    def plain_format(self) -> str:
        """Return the 16-bit format that all matrices are stored in; float32 where there are others, or blocks."""
        found = {PLAIN_TYPES.get(tensor.type_id, "blocks") for tensor in self.tensors if len(tensor.shape) > 1}
        only = found.pop() if len(found) == 1 else ""
        return only if only in ("bfloat16", "float16") else "float32"


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a file that is named, or begins, like GGUF."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Return the head of the file `path`.

    Raises
    ------
    ModelError
        If it is not GGUF, ends too early, or is of a version that nobody writes any more.
    """
    try:
        known = path.stat()
        return _read_header(path, known.st_size, known.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); expected a readable GGUF file.") from error


@lru_cache(maxsize=4)
def _read_header(path: Path, size: int, _: int) -> GgufHeader:
    with path.open("rb") as file:
        begins = file.read(24)
        if begins[:4] != MAGIC:
            found = "it is empty" if not begins else f"it begins with {begins[:4]!r}"
            raise ModelError(f"{path} is not a GGUF file: {found}; expected {MAGIC!r}. {AGAIN}")
        if len(begins) < 24:
            raise _cut(path, size)
        version = struct.unpack_from("<I", begins, 4)[0]
        if version not in _VERSIONS:
            raise ModelError(
                f"{path} is GGUF of version {version}; expected version {' or '.join(map(str, _VERSIONS))}, little-endian. "
                "Convert the model again with a newer llama.cpp."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _parsed(_Bytes(mapped, 8))
            except _CutShortError:
                raise _cut(path, size) from None
            except (ValueError, KeyError, UnicodeDecodeError) as error:
                raise ModelError(
                    f"the head of {path} is damaged: {error}; expected keys and tensors of GGUF. {AGAIN}"
                ) from error


def _cut(path: Path, size: int) -> ModelError:
    return ModelError(
        f"{path} is cut short: it ends after {size:,} bytes, within its head; expected a whole GGUF file. {AGAIN}"
    )


def _parsed(source: "_Bytes") -> GgufHeader:
    num_tensors, num_facts = source.numbers("QQ")
    facts = dict(source.fact() for _ in range(num_facts))
    if not isinstance(facts.get("general.architecture"), str):
        raise ValueError("it names no general.architecture")
    tensors = [source.tensor() for _ in range(num_tensors)]
    alignment = facts.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-source.position // alignment) * alignment
    placed = tuple(GgufTensor(each.name, each.shape, each.type_id, begin + each.begin) for each in tensors)
    return GgufHeader(facts, placed, begin)


class _Bytes:
    """What is read of a mapped file, from the front to the back."""

    def __init__(self, mapped: mmap.mmap, position: int) -> None:
        self._mapped, self.position = mapped, position

    def numbers(self, form: str) -> tuple[int, ...]:
        """Return the next numbers, of the `form` of the module struct."""
        begin = self._skipped(struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{form}", self._mapped, begin)

    def string(self) -> str:
        """Return the next string."""
        length = self.numbers("Q")[0]
        begin = self._skipped(length)
        return self._mapped[begin : begin + length].decode("utf-8")

    def fact(self) -> tuple[str, object]:
        """Return the next key and its value, of an array its length."""
        return self.string(), self._value(self.numbers("I")[0])

    def tensor(self) -> GgufTensor:
        """Return the next tensor; it begins that many bytes after the first one."""
        name = self.string()
        shape = self.numbers(f"{self.numbers('I')[0]}Q")
        type_id, begin = self.numbers("IQ")
        return GgufTensor(name, shape, type_id, begin)

    def _value(self, type_id: int) -> object:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.numbers(_SCALARS[type_id])[0]
        if type_id != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {type_id}")
        of, length = self.numbers("IQ")
        if of in _SCALARS:
            self._skipped(length * struct.calcsize(f"<{_SCALARS[of]}"))
        else:
            for _ in range(length):
                # A vocabulary has many strings, and none of them is needed here.
                self._skipped(self.numbers("Q")[0]) if of == _STRING else self._value(of)
        return length

    def _skipped(self, num_bytes: int) -> int:
        begin = self.position
        if num_bytes > len(self._mapped) - begin:
            raise _CutShortError
        self.position = begin + num_bytes
        return begin


def content_key(path: Path) -> str:
    """Return what tells the content of a GGUF file from another: a hash of its head and of both ends of every tensor.

    The head is hashed whole, because a tokenizer or a chat template may change alone; training changes all tensors.
    """
    header = read_header(path)
    digest = hashlib.sha256(f"{path.stat().st_size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(header.num_bytes))
        for begin in _samples(header, path.stat().st_size):
            file.seek(begin)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _samples(header: GgufHeader, size: int) -> Iterator[int]:
    begins = sorted({tensor.begin for tensor in header.tensors})
    for begin, end in zip(begins, [*begins[1:], size], strict=True):
        yield begin
        yield max(begin, end - _SAMPLE_BYTES)


_TOKENIZER = "tokenizer.ggml.model"


def check_gguf(path: Path) -> GgufHeader:
    """Return the head of the GGUF file `path`, and refuse what is no whole model of its own.

    Raises
    ------
    ModelError
        If it is not GGUF, cut short, a part of a model or without a tokenizer, or nothing here reads such files.
    """
    header = read_header(path)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path} is read with the package gguf, which is not installed; run: pip install 'pqkv[gguf]'")
    _check_size(path, header)
    kind, parts = header.facts.get("general.type", "model"), header.facts.get("split.count", 1)
    if kind != "model":
        raise ModelError(f"{path} holds no model but a part of one ({kind}); expected a whole one. Name the file of the model.")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model; expected all of it in one file. Merge them with "
            "'llama-gguf-split --merge FIRST_PART OUTPUT' of llama.cpp."
        )
    if _TOKENIZER not in header.facts:
        raise ModelError(f"{path} has no tokenizer ({_TOKENIZER}); expected one. Use the model's own checkpoint.")
    return header


def only_gguf(directory: Path) -> str:
    """Return a sentence that names a GGUF file in `directory`; empty where there is none."""
    files = sorted(path for path in directory.glob("*.gguf") if is_gguf(path))
    if not files:
        return ""
    return f" It holds {len(files)} GGUF file{'s' * (len(files) > 1)}: name the file itself, such as {files[0]}."


def _check_size(path: Path, header: GgufHeader) -> None:
    size, needed = path.stat().st_size, header.num_bytes
    for tensor in header.tensors:
        try:
            block, num_bytes = _block_of(tensor.type_id)
        except (KeyError, ValueError):
            raise ModelError(
                f"{path} has the tensor {tensor.name} of the type {tensor.type_id}, which the installed package gguf does not "
                "know; expected a type of GGUF. Update it (pip install --upgrade gguf), or use a file of another type."
            ) from None
        needed = max(needed, tensor.begin + prod(tensor.shape) // block * num_bytes)
    if size < needed:
        raise ModelError(f"{path} is cut short: it has {size:,} bytes and its head announces {needed:,}. {AGAIN}")


def _block_of(type_id: int) -> tuple[int, int]:
    """Return how many numbers, and how many bytes, a block of a type has."""
    import gguf  # an extra

    block: tuple[int, int] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    return block
