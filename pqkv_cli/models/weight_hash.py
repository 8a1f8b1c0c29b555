"""The hash of all weights of a model that its keys and values may depend on. Knows tensors and names; no attention.

Every parameter and saved buffer counts, vectors and embeddings too; only the matrix that makes logits is left out: no key or
value depends on it where it is not the embedding. Numbers are hashed as bfloat16 in pieces, several tensors at a time, so that
memory stays as it is; hashlib lets go of the interpreter while it works.
"""

import hashlib
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pqkv_cli.hf.modules import stored_tensors

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
