"""A GGUF file converted to safetensors once, kept in a cache, with its scaled rotary embedding put right.

The reader in transformers leaves scaled rotary embedding out: the model would be another one, right on the first tokens and
worse the longer the text.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub

from pqkv_cli.errors import ModelError, UnsupportedModelError, first_line
from pqkv_cli.files import free_bytes, new_directory, turn
from pqkv_cli.hf import gguf_files
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.gguf import FLOAT32, GgufHeader, GgufTensor, check_gguf, content_key, read_header
from pqkv_cli.models.structure import check_structure

_FACTORS = "rope_freqs.weight"
_OTHER_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# Of all published Llama 3 models; `factor` alone differs between them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE = 1e-3


def scaled_rotary(config: Any, header: GgufHeader, path: Path) -> None:
    """Set in `config` the scaling of the rotary embedding that the file `path` holds, where its reader left it out.

    Raises
    ------
    UnsupportedModelError
        If it is of a kind that cannot be told from the file.
    """
    whole = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    # Where kinds of layers rotate differently, those that see everything are the ones that are scaled.
    rope = whole.get("full_attention", whole)
    if rope.get("rope_type", "default") != "default":
        return
    factors = next((tensor for tensor in header.tensors if tensor.name == _FACTORS), None)
    if factors is not None:
        found = _llama3(_numbers(path, factors), float(rope["rope_theta"]))
    elif any(tensor.name in _OTHER_FACTORS for tensor in header.tensors):
        found = None
    else:
        found = _declared(header)
    if found is None:
        raise UnsupportedModelError(
            f"{path} scales its rotary embedding in a way that transformers does not read from GGUF; expected none, linear, "
            "yarn or that of Llama 3. Use the model's own checkpoint (config.json and *.safetensors)."
        )
    scaled = {**rope, **found}
    config.rope_parameters = scaled if rope is whole else {**whole, "full_attention": scaled}


def _declared(header: GgufHeader) -> dict[str, Any] | None:
    """Return what the keys of the file say, empty where there is no scaling, None where it is of another kind."""
    prefix = f"{header.architecture}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in header.facts.items() if key.startswith(prefix)}
    kind = said.pop("type", "none")
    factor, original = said.pop("factor", None), said.pop("original_context_length", None)
    said.pop("finetuned", None)
    if kind == "none":
        return {}
    if kind == "linear" and factor and not said:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original and not said:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return None


def _llama3(factors: torch.Tensor, theta: float) -> dict[str, Any] | None:
    """Return the settings that give `factors` ([D/2]: by what each frequency is divided), None if none do."""
    settings = {**_LLAMA3, "factor": round(float(factors.max()), 4)}
    waves = 2 * torch.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    low, high, original = (settings[name] for name in _LLAMA3)
    share = ((original / waves - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / settings["factor"] + share)
    is_same = torch.allclose(factors.double(), expected, rtol=_TOLERANCE)
    return {"rope_type": "llama3", **settings} if is_same else None


def _numbers(path: Path, tensor: GgufTensor) -> torch.Tensor:
    if tensor.type_id != FLOAT32 or len(tensor.shape) != 1:
        return torch.zeros(1)  # of no scaling that is known
    count = tensor.shape[0]
    with path.open("rb") as file:
        file.seek(tensor.begin)
        return torch.tensor(struct.unpack(f"<{count}f", file.read(4 * count)))


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
        raise ModelError(
            f"the GGUF file {path} cannot be read: {first_line(error)} Expected a language model with its tokenizer. Copy or "
            "download it again, or use the model's own checkpoint."
        ) from error
