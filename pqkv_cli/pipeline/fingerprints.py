"""Identifies models and texts by what they contain, without loading them. Knows files and hashes."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.text import HUB, STDLIB
from pqkv_cli.calibration.text_files import files_of, named_file
from pqkv_cli.models.gguf import content_key, is_gguf

_NUM_BLOCKS = 16
_BLOCK_BYTES = 4096


def text_identity(source: str) -> str:
    """Return what identifies what lies behind `source`.

    It is the hash of a file or of a directory's rows, the name of a built-in text and its origin, or that of a data set; of one
    in a local directory with the hash of its files.
    """
    path, column = named_file(source)
    end = "" if column is None else f" column {column}"
    if path.is_file():
        return _file_hash(path) + end
    if path.is_dir():
        return _files_hash(path, files_of(path)) + end
    if source.startswith(HUB):
        local = Path(source.removeprefix(HUB).partition("?")[0]).expanduser()
        if local.is_dir():
            return f"{source} of {_files_hash(local, sorted(file for file in local.rglob('*') if file.is_file()))}"
    if not source.startswith(STDLIB):
        return source  # of the hub: what its name says is all that is known without fetching it
    # The standard library is another text under every Python version.
    return f"{source} of Python {sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"


def texts_identity(sources: Sequence[str], fingerprint: str, seed: int) -> str:
    """Return what identifies the texts of `sources`; of ``self`` the model of `fingerprint` and its seed."""
    own = f"{SELF} of model {fingerprint} with seed {seed}"
    return " and ".join(own if source == SELF else text_identity(source) for source in sources)


def _files_hash(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}:{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(path_or_id: str) -> str:
    """Return what tells a model from another one at the same place: its configuration and blocks spread over its weights.

    A few kilobytes of each file are enough, because any training changes all weights. For a hub id it is the id, for a GGUF
    file a hash of its head and of the ends of its tensors.
    """
    root = Path(path_or_id)
    if is_gguf(root):
        return content_key(root)
    if not root.is_dir():
        return path_or_id
    digest = hashlib.sha256((root / "config.json").read_bytes())
    for path in sorted(root.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
