"""Scaled rotary embedding of a GGUF file. Knows how llama.cpp writes it; its own reader in transformers leaves it out.

Left out, a model would be another one: right on the first tokens, and worse the longer the text.
"""

import struct
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.models.gguf_header import FLOAT32, GgufHeader, GgufTensor

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
