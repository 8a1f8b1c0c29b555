"""Do the files of a model hold what their names say? Reads beginnings and ends; no weights, no transformers.

Told here in plain words: pointers of git-lfs in the place of files, empty and cut off files, and adapters.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pqkv_cli.errors import ModelError

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
