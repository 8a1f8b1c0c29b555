"""How much memory a model takes, from its config alone. Knows configs and parameter shapes; loads no weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pqkv_cli.errors import ModelError, first_line
from pqkv_cli.hf.configs import layer_config, layer_kind, text_config
from pqkv_cli.models.geometry import geometry, layer_types

_DEFAULT_ITEM_BYTES = 2  # bfloat16, where the config names no dtype


@dataclass(frozen=True, slots=True)
class LayerFootprint:
    """The cache of one layer that is not quantized.

    Attributes
    ----------
    channels
        Key and value channels of one token; 0 for a layer that keeps a state of constant size or no cache of its own.
    window_tokens
        Tokens it holds at most; 0 where it grows with the text.
    """

    channels: int
    window_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a model, in the dtype its config names."""

    num_parameters: int
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.num_parameters * self.item_bytes


def weights(config: PretrainedConfig) -> Weights:
    """Count the parameters of the model that `config` describes, tied ones once, without allocating them.

    Raises
    ------
    ModelError
        If transformers cannot build the model.
    """
    model = empty_model(config)
    dtype = getattr(config, "dtype", None)
    item_bytes = dtype.itemsize if isinstance(dtype, torch.dtype) else _DEFAULT_ITEM_BYTES
    return Weights(sum(p.numel() for p in model.parameters()), item_bytes)


def empty_model(config: PretrainedConfig) -> Any:
    """Return the model that `config` describes, without memory for its weights.

    Raises
    ------
    ModelError
        If transformers cannot build the model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"transformers cannot build a {config.model_type} model from its config: {first_line(error)}; expected a config "
            "from which it can. Check config.json against the model's original."
        ) from error


def layer_footprints(config: PretrainedConfig) -> tuple[LayerFootprint, ...]:
    """Return what each layer of the uncompressed model caches.

    Raises
    ------
    UnsupportedModelError, ModelError
        As `geometry`.
    """
    text, shape = text_config(config), geometry(config)
    rows = zip(layer_types(text), shape.cached_channels, strict=True)
    return tuple(LayerFootprint(channels, _window(text, index, kind)) for index, (kind, channels) in enumerate(rows))


def _window(text: Any, index: int, kind: str) -> int:
    if layer_kind(kind).growth != "window":
        return 0
    name = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window"
    return getattr(layer_config(text, index), name, None) or 0
