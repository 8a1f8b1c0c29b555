import pytest
import torch
from family_models import family_config, family_model
from tiny_chain import fit_artifact, tokens
from transformers import LlamaConfig

from pqkv_cli.errors import UsageError
from pqkv_cli.models.footprint import layer_footprints, weights
from pqkv_cli.pipeline.capacity import BATCHES, RESERVED_SHARE, capacity, parse_device_bytes
from pqkv_cli.runtime import attach, load
from pqkv_cli.specs import CacheSpec

LLAMA_3_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


@pytest.mark.parametrize(("word", "found"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("0.5tb", 5 * 10**11)])
def test_sizes(word: str, found: int) -> None:
    assert parse_device_bytes(word) == found


@pytest.mark.parametrize("word", ["24", "GB", "-1GB", "0GB", "24GBs", "24 apples", ""])
def test_sizes_without_sense(word: str) -> None:
    with pytest.raises(UsageError, match="expected a size with its unit, such as 24GB"):
        parse_device_bytes(word)


def test_llama_3_8b_on_24_gb() -> None:
    found = capacity(LlamaConfig(**LLAMA_3_8B), 24 * 10**9)
    assert found.weight_bytes == 8_030_261_248 * 2
    rows = {row.bits: row for row in found.rows}
    assert list(rows) == [16, 4, 3.5, 3, 2.5, 2, 1.5, 1]
    free = 24e9 * (1 - RESERVED_SHARE) - found.weight_bytes
    assert rows[16].bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert rows[16].tokens == tuple(int(free // (131072 * batch)) for batch in BATCHES)
    for bits in (4, 3.5, 3, 2.5, 2, 1.5, 1):
        assert rows[bits].bytes_per_token == 131072 * bits / 16 + 4
        per_token = rows[bits].bytes_per_token + 4096  # and the exact keys and values of the layer that is read
        exact = (4 + 64 + 128) * 131072
        expected = [int((free - rows[bits].table_bytes) / batch - exact) // int(per_token) for batch in BATCHES]
        assert rows[bits].tokens == pytest.approx(expected, abs=1)


def test_a_model_that_does_not_fit_has_no_tokens() -> None:
    assert {tokens for row in capacity(LlamaConfig(**LLAMA_3_8B), 10**9).rows for tokens in row.tokens} == {0}


def test_windows_and_shared_caches_are_counted_once() -> None:
    footprints = layer_footprints(family_config("gemma4_text"))
    assert [f.channels for f in footprints] == [2 * 2 * 16, 2 * 2 * 32, 0, 0]
    assert [f.window_tokens for f in footprints] == [40, 0, 40, 0]
    (row,) = [row for row in capacity(family_config("gemma4_text"), 10**9).rows if row.bits == 16]
    assert row.bytes_per_token == 2 * 2 * 32 * 2


def test_the_prediction_is_what_a_cache_holds(tmp_path) -> None:
    model = family_model("llama")
    assert weights(model.config).num_parameters == sum(p.numel() for p in model.parameters())
    with attach(model, load(fit_artifact(model, tmp_path))) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(tokens(1, 1000), past_key_values=cache)
    row = next(row for row in capacity(model.config, 10**9, CacheSpec(4, 64)).rows if row.bits == 4)
    coded = cache.quantized_layers[0].num_coded
    assert cache.num_bytes().codes + cache.num_bytes().positions - 16 == (
        (row.bytes_per_token - 4) * coded + 4 * 1000 + 4 * (1000 // 64)  # and where each page begins, which no one notices
    )
