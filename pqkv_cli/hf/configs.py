"""What configs of transformers say: the text decoder, classes of models, which kind of cache each layer has, single values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pqkv_cli.errors import ModelError


def text_config(config: PretrainedConfig) -> Any:
    """Return the part of `config` that describes the text decoder."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def is_language_model(config: PretrainedConfig, text: Any) -> bool:
    """Return whether transformers has a causal language model for `config` or its decoder `text`."""
    return bool({str(text.model_type), str(config.model_type)} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def is_encoder(text: Any) -> bool:
    """Return whether `text` describes an encoder that is not set up to decode."""
    return str(text.model_type) in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False)


def position_limit(config: PretrainedConfig) -> Any:
    """Return how many positions the text decoder names as its limit, as it stands there; None where it names none."""
    return getattr(text_config(config), "max_position_embeddings", None)


# What one more token adds: keys and values; the same until a window is full; nothing to a state of one size; no cache at all.
Growth = Literal["tokens", "window", "constant", "nothing"]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of layer.

    Attributes
    ----------
    growth
        What its cache does while the text grows.
    reason
        Why its cache is left as it is; empty where it can be quantized.
    unsupported
        Why a model with a layer of this kind cannot be quantized at all; empty where its other layers can.
    """

    growth: Growth
    reason: str = ""
    unsupported: str = ""


_RECURRENT = LayerKind("constant", "it keeps a recurrent state of constant size instead of keys and values")
_NO_CACHE = LayerKind("nothing", "it has no attention and keeps no cache")
_SELECTS = "they keep keys and values of all tokens, and {how} which of them to attend to; this is not handled"


def _selecting(how: str) -> LayerKind:
    return LayerKind("tokens", unsupported=_SELECTS.format(how=how))


KINDS: Mapping[str, LayerKind] = {
    "full_attention": LayerKind("tokens"),
    "sliding_attention": LayerKind("window", "sliding window of {sliding_window} tokens"),
    "chunked_attention": LayerKind("window", "attention in chunks of {attention_chunk_size} tokens"),
    "linear_attention": _RECURRENT,
    "conv": LayerKind("constant", "it keeps the last inputs of a convolution, of constant size, instead of keys and values"),
    "moe": _NO_CACHE,
    "mlp": _NO_CACHE,
    "sparse": _NO_CACHE,
    "dense": _NO_CACHE,
    "dummy": _NO_CACHE,
    "window_attention": LayerKind("nothing", unsupported="they attend within separate windows, as image encoders do"),
    "indexed_attention": _selecting("an indexer with a cache of its own chooses"),
    "minimax_m3_sparse": _selecting("an index over blocks of tokens chooses"),
    "compressed_sparse_attention": LayerKind(
        "tokens", unsupported="they keep compressed keys and values of all tokens and choose among them; this is not handled"
    ),
    "heavily_compressed_attention": LayerKind(
        "tokens", unsupported="they keep compressed keys and values of all tokens; coding these again is not handled"
    ),
    "hybrid": LayerKind(
        "tokens",
        "it keeps keys and values of all tokens and a recurrent state in one cache, which is not handled",
    ),
    "hybrid_sliding": LayerKind(
        "window", "it keeps a sliding window of {sliding_window} tokens and a recurrent state in one cache"
    ),
    "reference_sliding_attention": LayerKind(
        "tokens",
        unsupported="they keep the whole prompt, and of what is generated a window of {sliding_window} tokens; "
        "this is not handled",
    ),
}
# Older names that checkpoints and earlier versions of transformers use.
_FORMER_NAMES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}


def present_name(name: str) -> str:
    """Return what the newest transformers calls the kind `name`."""
    return _FORMER_NAMES.get(name, name)


def layer_kind(name: str) -> LayerKind:
    """Return what is known of the kind `name`, under its present or a former name.

    Of a kind without a row nothing is known, and `unsupported` says so.
    """
    kind = KINDS.get(present_name(name))
    if kind is None:
        return LayerKind("tokens", unsupported="what they keep in their cache is not known to this version of pqkv")
    return kind


T = TypeVar("T")


class _Required:
    """Type of `REQUIRED`."""


REQUIRED: Final = _Required()


def read(config: Any, key: str, kind: type[T], default: T | _Required = REQUIRED) -> T:
    """Return ``config.key`` as `kind`; an absent or None value gives `default`.

    Raises
    ------
    ModelError
        If the value is absent without a default, or has another type.
    """
    found = getattr(config, key, None)
    if found is None:
        if isinstance(default, _Required):
            raise ModelError(
                f"the model's config ({_name(config)}) has no {key!r}; expected {_article(kind)}. "
                "Check config.json against the model's original."
            )
        return default
    # bool is an int in Python, but a head count of True is a fault.
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise ModelError(
            f"{key!r} in the model's config ({_name(config)}) is {found!r}; expected {_article(kind)}. "
            "Check config.json against the model's original."
        )
    return found


def read_count(config: Any, key: str, default: int | _Required = REQUIRED) -> int:
    """Return a whole number of at least one.

    Raises
    ------
    ModelError
        If the value is absent without a default, no whole number, or below one.
    """
    found = read(config, key, int, default)
    if found < 1:
        raise ModelError(f"{key!r} in the model's config ({_name(config)}) is {found}; expected at least 1.")
    return found


def layer_config(text: Any, index: int) -> Any:
    """Return what `text` says about one layer: itself, except where layers differ in shape."""
    return text.per_layer_config[index] if getattr(text, "is_heterogeneous", False) else text


def layer_values(text: Any, key: str) -> list[Any]:
    """Return the values of `key` that layers have, each once and in order; empty where none has one.

    Where layers differ in shape, a key that has one value per layer may not be asked for as one.
    """
    configs = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    found = [value for each in configs if (value := getattr(each, key, None)) is not None]
    return [value for index, value in enumerate(found) if value not in found[:index]]


def _name(config: Any) -> str:
    return str(getattr(config, "model_type", "") or type(config).__name__)


def _article(kind: type) -> str:
    return {int: "a whole number", dict: "a mapping", list: "a list"}.get(kind, f"a {kind.__name__}")
