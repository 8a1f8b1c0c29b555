"""Save and open an artifact: one safetensors file, whole or not at all, refused unless every law holds. Knows no models."""

import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from pqkv_cli.artifact.faults import listed
from pqkv_cli.artifact.header import header_document, parse_document, parse_header
from pqkv_cli.artifact.schema import ARTIFACT_FILE, Header, canonical_json
from pqkv_cli.artifact.tensors import (
    DTYPES,
    LayerTables,
    TensorSpec,
    assemble_tables,
    expected_tensors,
    flatten_tables,
    spec_faults,
    tensor_bytes,
    value_faults,
)
from pqkv_cli.errors import ArtifactError
from pqkv_cli.files import write_bytes

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


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact that has kept every law.

    Attributes
    ----------
    header
        What it says about itself.
    tables
        Per layer the tables of keys and values, None where the layer stays dense.
    path, file_bytes
        The file it came from and its size.
    """

    header: Header
    tables: tuple[LayerTables | None, ...]
    path: Path
    file_bytes: int

    @property
    def sha256(self) -> str:
        """Content hash."""
        return self.header.sha256

    @property
    def table_bytes(self) -> int:
        """Bytes of all codebooks and transforms, as stored."""
        return tensor_bytes(self.header)


def artifact_file(path: Path | str) -> Path:
    """Return the artifact's file: `path` itself, or ``pqkv.safetensors`` in the directory `path`."""
    path = Path(path)
    return path / ARTIFACT_FILE if path.is_dir() else path


def save_artifact(path: Path | str, header: Header, tables: Sequence[LayerTables | None]) -> str:
    """Write an artifact and return its content hash; equal input gives equal bytes.

    Parameters
    ----------
    path
        The file, or an existing directory that receives ``pqkv.safetensors``.
    header
        Its `sha256` is ignored.
    tables
        Per layer, None where the header says dense. Codebooks fp16, maps fp32.

    Raises
    ------
    ArtifactError
        If header or tables break a law, or the file cannot be written; an older artifact then stays as it was.
    """
    try:
        file = artifact_file(path)
        data, sha256 = _serialize(header, tables)
    except (ArtifactError, OSError, ValueError) as error:
        raise ArtifactError(f"cannot save the artifact {path}: {error}") from error
    write_bytes(file, data, ArtifactError)
    return sha256


def open_artifact(path: Path | str, device: str | torch.device = "cpu") -> Artifact:
    """Open the artifact at `path`, a file or a directory that holds ``pqkv.safetensors``.

    Raises
    ------
    ArtifactError
        If there is none or it breaks a law of the format; the message names the law.
    """
    try:
        file = artifact_file(path)
        with _open_regular(file) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header, tables = _decode(stream, file_bytes, torch.device(device))
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist; make it with: pqkv export RUN") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; give the path of an artifact that you may read") from error
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from error
    return Artifact(header, tables, file, file_bytes)


def _open_regular(file: Path) -> BinaryIO:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ArtifactError(f"is not a regular file; give a file or a directory that holds {ARTIFACT_FILE}")
    return file.open("rb")


def _serialize(header: Header, tables: Sequence[LayerTables | None]) -> tuple[bytes, str]:
    header = parse_header(parse_document(_canonical(replace(header, sha256=""))))
    tensors = flatten_tables(header, tables)
    unsigned = io.BytesIO(save(tensors, metadata={METADATA_KEY: _canonical(header)}))
    head = read_head(unsigned, unsigned.getbuffer().nbytes)
    faults = spec_faults(expected_tensors(header), head.specs)
    if faults:
        raise ArtifactError(listed("the tables do not fit the header", faults))
    sha256 = content_sha256(head.text, head, read_data(unsigned, head))
    data = save(tensors, metadata={METADATA_KEY: _canonical(replace(header, sha256=sha256))})
    # What is written must open again: the reader's laws are the writer's laws.
    _decode(io.BytesIO(data), len(data), torch.device("cpu"))
    return data, sha256


def _canonical(header: Header) -> str:
    try:
        return canonical_json(header_document(header))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the header cannot be written as JSON: {error}") from error


def _decode(stream: BinaryIO, file_bytes: int, device: torch.device) -> tuple[Header, tuple[LayerTables | None, ...]]:
    head = read_head(stream, file_bytes)
    document = parse_document(head.text)
    header = parse_header(document)
    faults = spec_faults(expected_tensors(header), head.specs)
    if faults:
        raise ArtifactError(listed("its tensors are not those its header calls for", faults))
    data = read_data(stream, head)
    found = content_sha256(canonical_json({**document, "sha256": ""}), head, data)
    if found != header.sha256:
        raise ArtifactError(
            f"the content hash is {found[:12]}; the header says {header.sha256[:12] or 'nothing'}: "
            "the file was damaged or edited after it was written; copy it again or export it again"
        )
    tensors = make_tensors(head, data)
    faults, inverses = value_faults(header, tensors)
    if faults:
        raise ArtifactError(listed("its tensors hold values that cannot be used", faults))
    return header, assemble_tables(header, tensors, inverses, device)
