"""Models in GGUF files, read by transformers and made into models like any other. Knows what its reader leaves behind.

Everything is taken from the file alone: what lies beside it (a tokenizer, generation settings) may belong to another model.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig

from pqkv_cli.hf.loading import NO_CODE, no_progress_bar

_READER = "transformers.modeling_gguf_pytorch_utils"
_NAME = "model.gguf"
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_UNKNOWN = ("is not supported yet", "Unrecognized model", "Unrecognized configuration")
# Names of llama.cpp for how a byte-level vocabulary cuts text before it merges: these cut every digit off first, which the
# reader does not know; these others cut like GPT-2, which it takes for granted.
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_LIKE_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum"})


def read_config(path: Path) -> PretrainedConfig:
    """Return the config that the GGUF file `path` holds; raises whatever the library raises."""
    with _alone(path) as place, _quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(place, gguf_file=_NAME, trust_remote_code=NO_CODE)
    return config


def read_tokenizer(path: Path, facts: Mapping[str, object]) -> tuple[Any, bool]:
    """Return the tokenizer in the GGUF file `path`, and whether it cuts text as the file says.

    Parameters
    ----------
    facts
        What the file says of itself: its keys with single values.
    """
    rule = facts.get("tokenizer.ggml.pre")
    loader: Any = AutoTokenizer
    with _alone(path) as place, _quiet():
        tokenizer = loader.from_pretrained(place, gguf_file=_NAME, trust_remote_code=NO_CODE)
    _set_special_tokens(tokenizer, facts)
    backend = tokenizer.backend_tokenizer
    if rule in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer, True
    cuts_like_gpt2 = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    return tokenizer, rule is None or rule in _LIKE_GPT2 or not cuts_like_gpt2


def read_model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Return the model in the GGUF file `path`, its weights as plain numbers of `dtype`, and the names of tensors it lacks.

    `config` is what `read_config` gave; the model no longer counts as one with quantized weights.
    """
    loader: Any = AutoModelForCausalLM
    with _alone(path) as place, _quiet():
        model, report = loader.from_pretrained(
            place,
            gguf_file=_NAME,
            config=config,
            dtype=dtype,
            # Or kernels for blocks would be looked for on the hub.
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=NO_CODE,
            output_loading_info=True,
        )
    model.hf_quantizer = None  # it refuses to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, sorted(report["missing_keys"])


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write `model` and `tokenizer` into `directory` as safetensors and JSON."""
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def is_unknown_architecture(error: BaseException) -> bool:
    """Return whether the library failed with `error` because it cannot read models of that kind from GGUF."""
    return any(words in str(error) for words in _UNKNOWN)


def readable_architectures() -> tuple[str, ...]:
    """Return what the installed transformers reads from GGUF, by the names of transformers; for people."""
    return tuple(sorted(import_module(_READER).GGUF_SUPPORTED_ARCHITECTURES))


def _set_special_tokens(tokenizer: Any, facts: Mapping[str, object]) -> None:
    # Some versions of the reader take one for another.
    for kind, key in _SPECIAL_TOKENS.items():
        index = facts.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and getattr(tokenizer, f"{kind}_token_id") != index:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(index))


@contextmanager
def _alone(path: Path) -> Iterator[str]:
    """Yield a directory that holds nothing but the file `path`, under the name `_NAME`."""
    with tempfile.TemporaryDirectory(prefix="pqkv-") as place:
        os.symlink(path.resolve(), Path(place) / _NAME)
        yield place


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the library draw no bars while the block runs: its own, and one that asks nobody."""
    reader: Any = import_module(_READER)
    bar = reader.tqdm
    reader.tqdm = _no_bar
    try:
        with no_progress_bar():
            yield
    finally:
        reader.tqdm = bar


def _no_bar(items: Any, **_: Any) -> Any:
    return items
