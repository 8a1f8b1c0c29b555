"""Save and open an artifact: one file, whole or not at all, refused unless every law holds. Knows no models."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save

from pqkv_cli.artifact.container import METADATA_KEY, content_sha256, make_tensors, read_data, read_head
from pqkv_cli.artifact.document import listed, parse_document
from pqkv_cli.artifact.parse import parse_header
from pqkv_cli.artifact.schema import Header, canonical_json, header_document
from pqkv_cli.artifact.tensors import LayerTables, assemble_tables, expected_tensors, flatten_tables, tensor_bytes
from pqkv_cli.artifact.values import spec_faults, value_faults
from pqkv_cli.errors import ArtifactError
from pqkv_cli.files import write_bytes

ARTIFACT_FILE = "pqkv.safetensors"


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
