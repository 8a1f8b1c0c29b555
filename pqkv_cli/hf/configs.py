"""What every config of transformers says in the same words: where its text decoder is, which classes models have."""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES


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
