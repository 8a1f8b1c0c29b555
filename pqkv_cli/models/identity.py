"""Which model this is: hashes of its config and of all weights that its keys and values may depend on.

Every parameter and saved buffer counts, vectors and embeddings too; only the matrix that makes logits is left out: no key or
value depends on it where it is not the embedding. Numbers are hashed as bfloat16 in pieces, several tensors at a time, so that
memory stays as it is; hashlib lets go of the interpreter while it works.
"""

import hashlib
import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from pqkv_cli.hf.configs import layer_config, text_config
from pqkv_cli.hf.modules import attention_modules, stored_tensors
from pqkv_cli.specs import ModelIdentity

_PIECE = 1 << 23  # numbers converted at a time
_THREADS = 4
_COMPILED = "_orig_mod."  # what torch.compile puts between names
_LAYER = re.compile(r"\.(\d+)\.")


def all_weights_sha256(model: Any) -> str:
    """Return the hash of all weights, independent of device, of float format and of what stands in front of layers' names."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped = next((f"{name}." for name, module in model.named_modules() if head is not None and module is head), None)
    found: list[tuple[str, str]] = []
    pending: list[tuple[str, Future[str]]] = []
    # In a process made by fork, torch makes its own threads anew at the first call, and fails where two threads call at once.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, tensor in stored_tensors(model):
            if skipped is not None and name.startswith(skipped):
                continue
            key = f"{_short(name)}{list(tensor.shape)}"
            # An offloaded tensor is only there for now, so no more than a few may wait.
            pending.append((key, pool.submit(_digest, tensor.detach())))
            while len(pending) >= 2 * _THREADS:
                found.append(_settled(*pending.pop(0)))
        found += [_settled(*entry) for entry in pending]
    # By key alone: where two tensors share one, they stay in the order of their full names, and which is which counts.
    lines = [f"{key} {digest}" for key, digest in sorted(found, key=lambda entry: entry[0])]
    return hashlib.sha256("\n".join(["all-weights", *lines]).encode()).hexdigest()


def _settled(key: str, digest: Future[str]) -> tuple[str, str]:
    return key, digest.result()


def _short(name: str) -> str:
    """Return the layers' and experts' numbers and the last two words: what wrappers put in does not count."""
    name = name.replace(_COMPILED, "")
    return ".".join([*_LAYER.findall(f".{name}."), *name.split(".")[-2:]])


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    if hasattr(tensor, "__tensor_flatten__"):  # quantized weights that pose as one tensor: what they are made of
        parts, _ = tensor.__tensor_flatten__()
        return "+".join(_digest(getattr(tensor, part)) for part in sorted(parts))
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        if piece.is_floating_point():
            piece = piece.to(torch.bfloat16).view(torch.int16)
        array = piece.cpu().contiguous().numpy()
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)  # little-endian whatever the machine
    return digest.hexdigest()


# An explicit list: newer versions of transformers add fields with defaults, and that must not make another model.
# fmt: off
_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "rope_parameters", "layer_types", "sliding_window", "attention_chunk_size", "no_rope_layers", "attn_logit_softcapping",
    "query_pre_attn_scalar", "num_experts", "num_local_experts", "num_experts_per_tok",
)
# fmt: on


def model_identity(model: nn.Module) -> ModelIdentity:
    """Return the identity of a loaded model, independent of its path, device and transformers version.

    The weights are all but those of the matrix that makes logits, as they are stored: a checkpoint with quantized weights is
    another model than the one it was made from.
    """
    config: Any = model.config
    return ModelIdentity(config_sha256(config), all_weights_sha256(model), _former_weights_sha256(model))


def config_sha256(config: Any) -> str:
    """Return the hash of the architecture that `config` describes."""
    text = text_config(config)
    facts = {key: value for key in _CONFIG_KEYS if (value := _value(text, key)) is not None}
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


_ROTARY_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "layer_rope_theta", "partial_rotary_factor", "no_rope_layers")


def rotary_sha256(config: Any) -> str:
    """Return the hash of what `config` says about rotary embedding, and how far the model reads, on which some kinds depend."""
    text = text_config(config)
    facts = {key: value for key in (*_ROTARY_KEYS, "max_position_embeddings") if (value := _value(text, key)) is not None}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the hash of a tokenizer: its words, how texts are cut, what is added. Padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        facts |= {"padding": None, "truncation": None}  # changed by every call that asks for them
    else:
        facts = {"kind": type(tokenizer).__name__, "words": tokenizer.get_vocab()}
    facts = {"tokenizer": facts, "special": [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _value(text: Any, key: str) -> Any:
    if not getattr(text, "is_heterogeneous", False):
        return getattr(text, key, None)
    # Where layers differ in shape, some keys have one value per layer and may not be asked for as one.
    values = [getattr(layer_config(text, index), key, None) for index in range(text.num_hidden_layers)]
    return values[0] if all(value == values[0] for value in values) else values


def _former_weights_sha256(model: nn.Module) -> str:
    # All matrices of the first, middle and last attention module.
    modules = attention_modules(model)
    indices = sorted(modules)
    digest = hashlib.sha256()
    for index in sorted({indices[0], indices[len(indices) // 2], indices[-1]}):
        for name, tensor in stored_tensors(modules[index]):
            if tensor.ndim >= 2:
                digest.update(f"{index}.{name}{list(tensor.shape)}".encode())
                digest.update(_bytes(tensor.detach()))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    if hasattr(tensor, "__tensor_flatten__"):  # quantized weights that pose as one tensor: what they are made of
        parts, _ = tensor.__tensor_flatten__()
        return b"".join(_bytes(getattr(tensor, part)) for part in sorted(parts))
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16).view(torch.int16)
    # Hashed little-endian whatever the machine.
    array = tensor.cpu().contiguous().numpy()
    little: bytes = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return little
