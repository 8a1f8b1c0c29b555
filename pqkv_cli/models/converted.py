"""GGUF files as model directories: read once, written as safetensors into the user's cache, and found there afterwards.

Knows where conversions lie and what is refused; transformers reads the files (`pqkv_cli.hf.gguf_files`), some ten times slower
than what is written here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub

from pqkv_cli.errors import ModelError, UnsupportedModelError
from pqkv_cli.files import free_bytes, new_directory, turn
from pqkv_cli.hf import gguf_files
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.gguf_check import check_gguf
from pqkv_cli.models.gguf_header import GgufHeader, content_key, read_header
from pqkv_cli.models.gguf_rope import scaled_rotary
from pqkv_cli.models.structure import check_structure

# Raise it when the same file is to give other weights or another tokenizer than before.
_FORM = 1
_KEY_DIGITS = 16
Note = Callable[[str], None]


def nobody(text: str) -> None:
    """Take a note that nobody wants to read."""


def conversion(path: Path) -> Path:
    """Return where the conversion of the GGUF file `path` lies or would lie: beside the hub's cache, where HF_HOME says.

    Raises
    ------
    ModelError
        If the file is no model that can be converted, as far as its head tells.
    """
    check_gguf(path)
    return Path(hub.HF_HOME) / "pqkv" / "gguf" / f"{path.stem}-{content_key(path)[:_KEY_DIGITS]}-{_FORM}"


def converted(path: Path, note: Note = nobody) -> Path:
    """Return the directory of the model that the GGUF file `path` holds, and make it if it is not there.

    Parameters
    ----------
    note
        Is told, before the file is read, that this happens and where the directory will be.

    Raises
    ------
    ModelError
        If the file cannot be read or the directory not be written.
    UnsupportedModelError
        If transformers does not read models of its kind from GGUF, or its cache cannot be quantized.
    """
    place = conversion(path)
    if place.is_dir():
        return place
    try:
        with turn(place.parent / ".lock"):
            if not place.is_dir():
                convert(path, place, note)
    except OSError as error:
        raise ModelError(f"{place.parent} cannot be written ({error}); set HF_HOME to a directory that can.") from error
    return place


def convert(path: Path, directory: Path, note: Note = nobody) -> None:
    """Write the model in the GGUF file `path` as the new directory `directory`: config, tokenizer, safetensors.

    Weights are written as float32, in which what blocks stand for is exact; of a file whose matrices are all bfloat16 or all
    float16, in that format.

    Raises
    ------
    ModelError, UnsupportedModelError
        As `converted`.
    """
    header = check_gguf(path)
    if directory.exists():
        raise ModelError(f"{directory} exists; expected a place for the conversion of {path}. Remove it or name another one.")
    dtype: torch.dtype = getattr(torch, header.plain_format())
    _check_room(directory, header, dtype)
    note(f"converting {path.name} into safetensors, once: it lies in {directory} from then on")
    config = gguf_config(path)
    with _readable(path):
        tokenizer, cuts_as_said = gguf_files.read_tokenizer(path, header.facts)
    if not cuts_as_said:
        note(
            f"warning: the tokenizer of {path.name} cuts text by the rule {header.facts['tokenizer.ggml.pre']!r}, which "
            f"transformers {transformers.__version__} does not know: it cuts like GPT-2, and some words may become other tokens"
        )
    with _readable(path):
        model, missing = gguf_files.read_model(path, config, dtype)
    if missing:  # they are random numbers
        raise ModelError(
            f"{path} lacks {len(missing)} tensors of {config.model_type} ({', '.join(missing[:3])}, ...); expected all. "
            "Download it again, or use the model's own checkpoint."
        )
    with new_directory(directory, ModelError) as unfinished:
        gguf_files.save(model, tokenizer, unfinished)


def gguf_config(path: Path) -> Any:
    """Return the config of the model in the GGUF file `path`, read from the file itself.

    Raises
    ------
    ModelError, UnsupportedModelError
        As `converted`.
    """
    header = check_gguf(path)
    with _readable(path):
        config = gguf_files.read_config(path)
    config.dtype = getattr(torch, header.plain_format())
    scaled_rotary(config, header, path)
    check_quantizable(geometry(config))
    check_structure(config)
    return config


def _check_room(directory: Path, header: GgufHeader, dtype: torch.dtype) -> None:
    needed = dtype.itemsize * sum(prod(tensor.shape) for tensor in header.tensors)
    free = free_bytes(directory)
    if free < needed:
        raise ModelError(
            f"the conversion into {directory} needs {needed:,} bytes and {free:,} are free; free some space there, or set "
            "HF_HOME to a directory on a larger disk."
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a library raise anything
        if gguf_files.is_unknown_architecture(error):
            known = ", ".join(gguf_files.readable_architectures())
            raise UnsupportedModelError(
                f"{path} is a model of the architecture {read_header(path).architecture!r}, which transformers "
                f"{transformers.__version__} does not read from GGUF; expected one of {known}. "
                "Use the model's own checkpoint (config.json and *.safetensors)."
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the GGUF file {path} cannot be read: {lines[0]} Expected a language model with its tokenizer. Copy or download "
            "it again, or use the model's own checkpoint."
        ) from error
