"""The published shape of every model that has a recipe: what its config.json on the hub says, and what follows from it.

`config` repeats the fields that decide the cache, in the file's own spelling; they were compared on 2026-11-22 with copies of
the file (of the repository or of fine-tunes that kept the shape) that public indexes hold. `published` is the month of the
release. The rest is counted by hand from the model's card or paper, and is what our reading of the config must come to.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"}


@dataclass(frozen=True)
class Published:
    """One model. `heads` are query heads, key/value heads and head_dim; `quantized` names the layers with a growing cache."""

    model: str
    published: str
    config: dict[str, Any]
    heads: tuple[int, int, int]
    num_layers: int
    max_positions: int
    rope_theta: float
    rope_type: str = "default"
    quantized: tuple[int, ...] | None = None  # None: all
    unrotated: tuple[int, ...] = field(default=())  # layers whose keys have no rotary embedding


def _llama(hidden: int, heads: int, kv_heads: int, layers: int, positions: int, theta: float, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers)
    return {"model_type": "llama", **sizes, "max_position_embeddings": positions, "rope_theta": theta, **more}


def _scaled(factor: float) -> dict[str, Any]:
    return {"rope_scaling": {"factor": factor, **_LLAMA3_ROPE}}


_QWEN = {"use_sliding_window": False, "rope_scaling": None}

MODELS = {
    "llama-2-7b": Published(
        "meta-llama/Llama-2-7b-hf", "2023-07", _llama(4096, 32, 32, 32, 4096, 10000.0), (32, 32, 128), 32, 4096, 10000.0
    ),
    "llama-3-8b": Published(
        "meta-llama/Meta-Llama-3-8B", "2024-04", _llama(4096, 32, 8, 32, 8192, 500000.0), (32, 8, 128), 32, 8192, 500000.0
    ),
    "llama-3.1-8b": Published(
        "meta-llama/Llama-3.1-8B",
        "2024-07",
        _llama(4096, 32, 8, 32, 131072, 500000.0, **_scaled(8.0)),
        (32, 8, 128),
        32,
        131072,
        500000.0,
        "llama3",
    ),
    "llama-3.2-1b": Published(
        "meta-llama/Llama-3.2-1B",
        "2024-09",
        _llama(2048, 32, 8, 16, 131072, 500000.0, head_dim=64, **_scaled(32.0)),
        (32, 8, 64),
        16,
        131072,
        500000.0,
        "llama3",
    ),
    "llama-3.2-3b": Published(
        "meta-llama/Llama-3.2-3B",
        "2024-09",
        _llama(3072, 24, 8, 28, 131072, 500000.0, head_dim=128, **_scaled(32.0)),
        (24, 8, 128),
        28,
        131072,
        500000.0,
        "llama3",
    ),
    "mistral-7b": Published(
        "mistralai/Mistral-7B-v0.3",
        "2024-05",
        _llama(4096, 32, 8, 32, 32768, 1000000.0, model_type="mistral", sliding_window=None),
        (32, 8, 128),
        32,
        32768,
        1000000.0,
    ),
    "qwen2.5-7b": Published(
        "Qwen/Qwen2.5-7B",
        "2024-09",
        _llama(3584, 28, 4, 28, 131072, 1000000.0, model_type="qwen2", sliding_window=131072, max_window_layers=28, **_QWEN),
        (28, 4, 128),
        28,
        131072,
        1000000.0,
    ),
    "qwen3-8b": Published(
        "Qwen/Qwen3-8B",
        "2025-04",
        _llama(4096, 32, 8, 36, 40960, 1000000.0, model_type="qwen3", head_dim=128, sliding_window=None, **_QWEN),
        (32, 8, 128),
        36,
        40960,
        1000000.0,
    ),
    "qwen3-32b": Published(
        "Qwen/Qwen3-32B",
        "2025-04",
        _llama(5120, 64, 8, 64, 40960, 1000000.0, model_type="qwen3", head_dim=128, sliding_window=None, **_QWEN),
        (64, 8, 128),
        64,
        40960,
        1000000.0,
    ),
    # Five layers slide over 1,024 tokens, the sixth has full attention; the file leaves to the library what it does not say.
    "gemma-3-12b": Published(
        "google/gemma-3-12b-pt",
        "2025-03",
        {
            "model_type": "gemma3",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "image_size": 896,
                "patch_size": 14,
            },
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 3840,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "num_hidden_layers": 48,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
        (16, 8, 256),
        48,
        131072,
        1000000.0,
        "linear",
        (5, 11, 17, 23, 29, 35, 41, 47),
    ),
    "phi-4": Published(
        "microsoft/phi-4",
        "2025-01",
        _llama(5120, 40, 10, 40, 16384, 250000.0, model_type="phi3", sliding_window=None, pad_token_id=100257)
        | {"original_max_position_embeddings": 16384, "rope_scaling": None},
        (40, 10, 128),
        40,
        16384,
        250000.0,
    ),
    "gpt-oss-20b": Published(
        "openai/gpt-oss-20b",
        "2025-08",
        _llama(2880, 64, 8, 24, 131072, 150000.0, model_type="gpt_oss", head_dim=64, sliding_window=128, rope_scaling=_YARN)
        | {"layer_types": ["sliding_attention", "full_attention"] * 12},
        (64, 8, 64),
        24,
        131072,
        150000.0,
        "yarn",
        tuple(range(1, 24, 2)),
    ),
    "smollm2-135m": Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "2024-11",
        _llama(576, 9, 3, 30, 8192, 100000.0),
        (9, 3, 64),
        30,
        8192,
        100000.0,
    ),
    "smollm3-3b": Published(
        "HuggingFaceTB/SmolLM3-3B",
        "2025-07",
        _llama(2048, 16, 4, 36, 65536, 5000000.0, model_type="smollm3", no_rope_layer_interval=4, sliding_window=None)
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36},
        (16, 4, 128),
        36,
        65536,
        5000000.0,
        unrotated=tuple(range(3, 36, 4)),
    ),
}

# What decides the weights: intermediate_size, vocab_size, whether input and output embeddings are one, and the number of
# parameters that the model's card names, in billions.
WEIGHTS = {
    "llama-2-7b": (11008, 32000, False, 6.74),
    "llama-3-8b": (14336, 128256, False, 8.03),
    "llama-3.1-8b": (14336, 128256, False, 8.03),
    "llama-3.2-1b": (8192, 128256, True, 1.24),
    "llama-3.2-3b": (8192, 128256, True, 3.21),
    "mistral-7b": (14336, 32768, False, 7.25),
    "qwen2.5-7b": (18944, 152064, False, 7.61),
    "qwen3-8b": (12288, 151936, False, 8.19),
    "qwen3-32b": (25600, 151936, False, 32.8),
    "gemma-3-12b": (15360, 262208, True, 12.2),
    "phi-4": (17920, 100352, False, 14.7),
    "gpt-oss-20b": (2880, 201088, False, 20.9),
    "smollm2-135m": (1536, 49152, True, 0.135),
    "smollm3-3b": (11008, 128256, True, 3.08),
}


def config_of(name: str) -> Any:
    """Return the config of the model of a recipe, built without network."""
    intermediate, vocabulary, tied, _ = WEIGHTS[name]
    sizes = {"intermediate_size": intermediate, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    fields = dict(MODELS[name].config)
    if "text_config" in fields:
        fields["text_config"] = fields["text_config"] | sizes
    else:
        fields |= sizes | ({"num_local_experts": 32} if fields["model_type"] == "gpt_oss" else {})
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
