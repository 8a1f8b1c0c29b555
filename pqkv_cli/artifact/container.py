"""The safetensors container: its head, checked before anything is allocated, and its tensors. Knows no codecs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from pqkv_cli.artifact.tensors import DTYPES, TensorSpec
from pqkv_cli.errors import ArtifactError

METADATA_KEY = "pqkv"
MAX_HEAD_BYTES = 1 << 22
_LENGTH_BYTES = 8
_CUT_OFF = "it is not a safetensors file or was cut off; copy it again or export it again"


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the tensors: the text under `pqkv`, each tensor's type and its bytes, counted from `data_start`."""

    text: str
    specs: Mapping[str, TensorSpec]
    spans: Mapping[str, tuple[int, int]]
    data_start: int


def read_head(stream: BinaryIO, file_bytes: int) -> Head:
    """Return the head of a file of `file_bytes` bytes.

    Raises
    ------
    ArtifactError
        If it is no safetensors file, is cut off, or has other metadata than the one key `pqkv`.
    """
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if file_bytes < _LENGTH_BYTES or not 2 <= length <= file_bytes - _LENGTH_BYTES:
        raise ArtifactError(f"the file holds {file_bytes} bytes and promises a head of {length} bytes; {_CUT_OFF}")
    if length > MAX_HEAD_BYTES:
        raise ArtifactError(f"the head has {length} bytes; expected at most {MAX_HEAD_BYTES}; give what pqkv export wrote")
    document = _head_document(stream.read(length))
    metadata = document.pop("__metadata__", None)
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise ArtifactError(f"the metadata has no key {METADATA_KEY!r}; give a file that pqkv export wrote")
    if len(metadata) > 1:
        surplus = ", ".join(ascii(key[:40]) for key in sorted(metadata)[:5] if key != METADATA_KEY)
        raise ArtifactError(f"the metadata has keys beside {METADATA_KEY!r}: {surplus}; export the artifact again")
    text = metadata[METADATA_KEY]
    if not isinstance(text, str):
        raise ArtifactError(f"the metadata under {METADATA_KEY!r} is not a string; export the artifact again")
    specs, spans = {}, {}
    for name, entry in document.items():
        specs[name], spans[name] = _entry(name, entry)
    data_start = _LENGTH_BYTES + length
    _check_spans(spans, file_bytes - data_start)
    return Head(text, specs, spans, data_start)


def read_data(stream: BinaryIO, head: Head) -> bytearray:
    """Return all tensor bytes; `stream` stands where `read_head` left it.

    Raises
    ------
    ArtifactError
        If a tensor's bytes do not fit its shape, or the file ends early.
    """
    for name, (start, end) in head.spans.items():
        if end - start != head.specs[name].num_bytes:
            found, expected = end - start, head.specs[name].num_bytes
            raise ArtifactError(f"tensor {name} holds {found} bytes; expected {expected}; export the artifact again")
    size = max((end for _, end in head.spans.values()), default=0)
    data = bytearray(size)
    found, view = 0, memoryview(data)
    while found < size:
        step = stream.readinto(view[found:])  # type: ignore[attr-defined]
        if not step:
            raise ArtifactError(f"the file ends after {found} of {size} tensor bytes; {_CUT_OFF}")
        found += step
    return data


def content_sha256(canonical: str, head: Head, data: bytearray) -> str:
    """Return the content hash: `canonical` header text with an empty hash, then every tensor in the order of names."""
    digest = hashlib.sha256(canonical.encode("ascii"))
    view = memoryview(data)
    for name in sorted(head.specs):
        spec, (start, end) = head.specs[name], head.spans[name]
        digest.update(f"\n{name} {spec.dtype} {'x'.join(map(str, spec.shape))}\n".encode("ascii"))
        digest.update(view[start:end])
    return digest.hexdigest()


def make_tensors(head: Head, data: bytearray) -> dict[str, torch.Tensor]:
    """Return the tensors, each with memory of its own."""
    tensors = {}
    for name, (start, end) in head.spans.items():
        spec = head.specs[name]
        tensors[name] = torch.frombuffer(data[start:end], dtype=DTYPES[spec.dtype]).reshape(spec.shape)
    return tensors


def _head_document(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("ascii")
        document = json.loads(text)
        compact = json.dumps(document, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the head is not valid JSON ({str(error)[:200]}); {_CUT_OFF}") from error
    # Nothing but the padding may vary, so that no byte of a file can change unseen.
    if not isinstance(document, dict) or text.rstrip(" ") != compact:
        raise ArtifactError(f"the head is not a compact JSON object; {_CUT_OFF}")
    return document


def _entry(name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    if isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2:
            return TensorSpec(dtype[:16], tuple(shape)), (offsets[0], offsets[1])
    raise ArtifactError(f"tensor {name[:100]!a} is not described by dtype, shape and data_offsets; {_CUT_OFF}")


def _naturals(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_spans(spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    due = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != due or end < start:
            raise ArtifactError(f"tensor {name[:100]!a} lies at bytes {start} to {end}; expected a start at {due}; {_CUT_OFF}")
        due = end
    if due != data_bytes:
        raise ArtifactError(f"the file holds {data_bytes} tensor bytes and its head promises {due}; {_CUT_OFF}")
