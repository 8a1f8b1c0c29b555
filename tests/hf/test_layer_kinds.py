"""The table of layer kinds against what the installed transformers knows, and what people are told of each kind."""

from typing import Any

import pytest
from transformers import AutoConfig, cache_utils, configuration_utils

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.configs import _FORMER_NAMES, KINDS, layer_kind, present_name
from pqkv_cli.models.footprint import layer_footprints
from pqkv_cli.models.geometry import check_quantizable, geometry, layer_types


def kinds_of_transformers() -> set[str]:
    """Every kind that the installed version lists or makes a cache layer for, under whatever name the tables have there."""
    allowed: set[str] = set()
    for name in ("ALLOWED_LAYER_TYPES", "ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_MLP_LAYER_TYPES"):
        allowed |= set(getattr(configuration_utils, name, ()))
    for name in ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING"):
        allowed |= set(getattr(cache_utils, name, {}))
    assert allowed, "transformers lists its kinds of layers elsewhere; find the new place"
    return allowed


def test_every_kind_of_transformers_is_known() -> None:
    new = {name for name in kinds_of_transformers() if present_name(name) not in KINDS}
    assert new == set(), f"transformers has new kinds of layers: say in the table what they keep: {', '.join(sorted(new))}"


def test_former_names_are_those_of_transformers() -> None:
    remap = getattr(configuration_utils, "_LEGACY_LAYER_TYPE_REMAP", {})
    # Some versions call by another name what has a row here: it must keep the same of a text under both.
    both = {former: now for former, now in remap.items() if former in KINDS}
    assert [KINDS[former].growth for former in both] == [KINDS[now].growth for now in both.values()]
    others = {former: now for former, now in remap.items() if former not in KINDS}
    assert {former: _FORMER_NAMES.get(former) for former in others} == others


def test_only_full_attention_is_quantized() -> None:
    assert [name for name, kind in KINDS.items() if not kind.reason and not kind.unsupported] == ["full_attention"]
    assert {kind.growth for kind in KINDS.values()} <= {"tokens", "window", "constant", "nothing"}


def config_with(kinds: list[str], **changes: Any) -> Any:
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=len(kinds), hidden_size=64, num_attention_heads=4, num_key_value_heads=4
    )
    for key, value in {"layer_types": kinds, **changes}.items():
        config.__dict__[key] = value
    return config


SELECTING = ["indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention", "minimax_m3_sparse"]
OTHERS = ["compressed_sparse_attention", "heavily_compressed_attention", "reference_sliding_attention", "window_attention"]


@pytest.mark.parametrize("kind", [*SELECTING, *OTHERS, "a_new_kind"])
def test_a_model_with_kinds_that_are_not_handled_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        geometry(config_with(["full_attention", kind], sliding_window=8))
    message = str(caught.value)
    assert f"1 of its 2 layers are of the kind {present_name(kind)}" in message
    assert "no growing cache" not in message and "{" not in message
    if kind in SELECTING:
        assert "keep keys and values of all tokens" in message and "which of them to attend to" in message
    if kind == "a_new_kind":
        assert "not known to this version of pqkv" in message


@pytest.mark.parametrize(
    ("kind", "words", "channels", "window"),
    [
        ("linear_attention", "recurrent state of constant size", 0, 0),
        ("mamba", "recurrent state of constant size", 0, 0),
        ("conv", "last inputs of a convolution", 0, 0),
        ("moe", "keeps no cache", 0, 0),
        ("mlp", "keeps no cache", 0, 0),
        ("sliding_attention", "sliding window of 8 tokens", 128, 8),
        ("chunked_attention", "chunks of 16 tokens", 128, 16),
        ("hybrid", "keys and values of all tokens and a recurrent state", 128, 0),
        ("hybrid_sliding", "sliding window of 8 tokens and a recurrent state", 128, 8),
    ],
)
def test_layers_that_stay_as_they_are(kind: str, words: str, channels: int, window: int) -> None:
    config = config_with(["attention", kind], sliding_window=8, attention_chunk_size=16)
    shape = geometry(config)
    assert shape.layers[0].dense_reason == "" and words in shape.layers[1].dense_reason
    assert shape.cached_channels == (128, channels)
    assert [(row.channels, row.window_tokens) for row in layer_footprints(config)] == [(128, 0), (channels, window)]
    assert layer_types(config) == ("full_attention", present_name(kind))
    check_quantizable(shape)


def test_hybrids_alone_are_refused_in_true_words() -> None:
    with pytest.raises(UnsupportedModelError, match="2 x it keeps keys and values of all tokens and a recurrent state"):
        check_quantizable(geometry(config_with(["hybrid"] * 2)))


@pytest.mark.parametrize("name", ["linear_attention", "attention", "full_attention"])
def test_names(name: str) -> None:
    assert layer_kind(name) is KINDS[present_name(name)]
