"""Is a GGUF file a whole model that can be read here? Knows its head and the package gguf; reads no weights."""

import importlib.util
from math import prod
from pathlib import Path

from pqkv_cli.errors import ModelError
from pqkv_cli.models.gguf_header import AGAIN, GgufHeader, is_gguf, read_header

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
