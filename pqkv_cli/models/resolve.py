"""From what a user calls a model to its files, checked: beginnings and ends are read, no weights. No transformers.

Refused in plain words: pointers of git-lfs in the place of files, empty and cut off files, and adapters.
"""

import importlib.resources
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.errors import ModelError
from pqkv_cli.models.gguf import check_gguf, is_gguf, only_gguf

ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLED, _ZIPPED = b"\x80", b"PK"
_TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json")
_READ_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES, "*.index.json")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
MERGE = (
    "merge the adapter into its base model with peft (PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained), and name the directory of the merged model"
)


def check_files(root: Path) -> None:
    """Refuse a model directory whose files are not what they should be.

    Raises
    ------
    ModelError
        If a file is a pointer of git-lfs, one that is read whole is empty, or an adapter lies beside the weights.
    """
    check_no_adapter(root)
    for path in _existing(root, _WEIGHT_FILES):
        _check_pointer(path)
    for path in _existing(root, _READ_FILES):
        _check_content(path)


def check_weights(root: Path) -> None:
    """Refuse weights that are not whole.

    Raises
    ------
    ModelError
        If a file of weights is empty, cut off or of another kind, or one that an index lists is missing.
    """
    for path in _existing(root, _WEIGHT_FILES):
        _check_content(path)
    for path in _existing(root, ("*.safetensors",)):
        _check_safetensors(path)
    for path in _existing(root, ("pytorch_model*.bin",)):
        if not _begins(path).startswith((_PICKLED, _ZIPPED)):
            raise ModelError(f"{path} is not a file of weights; expected one that torch wrote. Copy it again.")
    for path in _existing(root, ("*.safetensors.index.json", "pytorch_model*.bin.index.json")):
        _check_index(path)


def check_no_adapter(root: Path) -> None:
    """Refuse a directory with an adapter, alone or beside base weights.

    Raises
    ------
    ModelError
        If there is one.
    """
    if not (root / ADAPTER).is_file():
        return
    if not (root / "config.json").is_file():
        raise ModelError(f"{root} holds only an adapter ({ADAPTER}), no model; expected config.json and weights: {MERGE}.")
    raise ModelError(
        f"{root} holds an adapter ({ADAPTER}) beside a model, and with it the model is another one; expected one model: "
        f"{MERGE}; or move {ADAPTER} away to use the base model without it."
    )


def _existing(root: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    yield from dict.fromkeys(path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file())


def _begins(path: Path, num_bytes: int = len(_POINTER)) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); expected a readable file of a model.") from error


def _check_content(path: Path) -> None:
    _check_pointer(path)
    if not _begins(path) and path.name != "merges.txt":
        raise ModelError(f"{path} is empty; expected the content of a model's file. Copy or download it again.")


def _check_pointer(path: Path) -> None:
    if _begins(path) == _POINTER:
        raise ModelError(
            f"{path} is a pointer of git-lfs, not the file itself; expected the content. Fetch it: run 'git lfs install' and "
            "'git lfs pull' in that directory, or download the model with 'hf download'."
        )


def _check_safetensors(path: Path) -> None:
    """Compare the size of a file with what its header says; the tensors are not read."""
    size = path.stat().st_size
    length = int.from_bytes(_begins(path, 8), "little")
    problem = "it ends within its header"
    if 8 + length <= size:
        try:
            header = json.loads(_begins(path, 8 + length)[8:])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            problem = "its header is not one of safetensors"
        else:
            if needed <= size:
                return
            problem = f"it has {size:,} bytes and its header describes {needed:,}"
    raise ModelError(f"the weights {path} are damaged or cut off: {problem}; expected a whole file. Copy or download it again.")


def _check_index(path: Path) -> None:
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{path} is damaged; expected a weight_map from tensors to files. Copy it again.") from None
    missing = sorted(str(name) for name in named if not (path.parent / str(name)).is_file())
    if missing:
        raise ModelError(
            f"{path} names {len(named)} files of weights and {len(missing)} are not there ({', '.join(missing[:3])}); "
            "expected all of them beside it. Copy or download the whole model."
        )


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
    # By its folder: nobody imports pqkv_cli.demo, which holds data only.
    path = Path(str(importlib.resources.files("pqkv_cli").joinpath("demo", "model")))
    if not path.is_dir():
        raise ModelError(
            f"the embedded demo model is not there; looked for {path}. Install pqkv again (its package data are missing)."
        )
    check_model_directory(path)
    return path
