"""From what a user typed to a model's place. Knows the file system and name shapes; opens no model, asks no network."""

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.errors import ModelError
from pqkv_cli.models.gguf_check import check_gguf, only_gguf
from pqkv_cli.models.gguf_header import is_gguf
from pqkv_cli.models.model_files import check_files, check_no_adapter

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies: a directory, a GGUF file or an id. `label` names it to people and carries no path."""

    path_or_id: str
    is_local: bool
    label: str


def resolve_model(reference: str) -> ResolvedModel:
    """Return the place of `reference`: the word ``demo``, a local directory or GGUF file, or an ``org/name`` hub id.

    ``demo`` is always the embedded model; a directory of that name is ``./demo``.

    Raises
    ------
    ModelError
        If it is none of them, or a local directory or file that holds no complete model.
    """
    if reference == DEMO:
        return ResolvedModel(str(_demo_directory()), True, DEMO)
    path = Path(reference).expanduser()
    if reference and is_gguf(path):
        check_gguf(path)
        return ResolvedModel(str(path), True, path.stem)
    if reference and path.exists():
        check_model_directory(path)
        return ResolvedModel(str(path), True, path.resolve().name)
    if _HUB_ID.fullmatch(reference):
        return ResolvedModel(reference, False, reference)
    raise ModelError(
        f"model {reference!r} is not there: no such directory ({path.absolute()}), and not an org/name id of the hub. "
        "Name a directory with config.json and *.safetensors, a GGUF file, a hub id such as org/name, or 'demo'."
    )


def check_model_directory(path: Path) -> None:
    """Refuse a place that cannot be a transformers model.

    Raises
    ------
    ModelError
        If it is a file, is empty, lacks config.json or weights, holds an adapter, or a file is not what its name says.
    """
    expected = "expected a directory with config.json, *.safetensors and a tokenizer, as save_pretrained writes it"
    if not path.is_dir():
        raise ModelError(f"{path} is a file; {expected}. Name its directory.")
    if not any(path.iterdir()):
        raise ModelError(f"the model directory {path} is empty; {expected}. Copy or download the model there.")
    check_no_adapter(path)
    if not (path / "config.json").is_file():
        remedy = only_gguf(path) or " Name the directory that holds it."
        raise ModelError(f"the model directory {path} has no config.json; {expected}.{remedy}")
    if not any(match for pattern in _WEIGHTS for match in path.glob(pattern)):
        raise ModelError(
            f"the model directory {path} has a config.json but no weights; looked for {', '.join(_WEIGHTS)}. "
            "Copy the weights there too."
        )
    check_files(path)


def _demo_directory() -> Path:
    # Through the package, not through pqkv_cli.demo, which nobody imports.
    path = Path(str(importlib.resources.files("pqkv_cli").joinpath("demo", "model")))
    if not path.is_dir():
        raise ModelError(
            f"the embedded demo model is not there; looked for {path}. Install pqkv again (its package data are missing)."
        )
    check_model_directory(path)
    return path
