from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_chain import tokens

from pqkv_cli.evaluation.record import cache_bits, codec_bits
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.runtime import attach
from pqkv_cli.specs import CacheSpec

LAYERS, SIDES, HEADS, DIM, FP32 = 2, 2, 2, 16, 4


@pytest.mark.parametrize("bits", [4, 1])
def test_mode_all_counts_codes_alone(bits: int, subject: Callable[..., Subject]) -> None:
    found = codec_bits(subject(bits).artifact).document()
    assert found == {"total": bits, "codes": bits, "scales": 0, "exact_tokens": 0, "positions": 0, "asymptotic": bits}


@pytest.mark.parametrize(
    ("num_tokens", "batch", "spec", "pages"),
    [(200, 1, CacheSpec(4, 64), 3), (200, 3, CacheSpec(0, 0), 3), (63, 1, CacheSpec(4, 64), 0), (192, 2, CacheSpec(8, 64), 2)],
)
@torch.no_grad()
def test_mode_cache_against_arithmetic_by_hand(
    num_tokens: int, batch: int, spec: CacheSpec, pages: int, subject: Callable[..., Subject]
) -> None:
    made = subject()
    with attach(made.model, made.artifact, cache=spec) as attached:
        cache = attached.new_cache()
        made.model(tokens(batch, num_tokens), past_key_values=cache, use_cache=True)
    vectors = LAYERS * SIDES * batch * HEADS
    codes = vectors * pages * 64 * DIM * 4 // 8  # 4 bits per channel
    # The window holds just the tokens there are; once it has dropped some, its buffer has all the room it will ever need.
    room = max(spec.window_tokens, 63) + 128
    exact_tokens = (spec.num_sinks if pages else 0) + (room if num_tokens - spec.window_tokens > 126 else num_tokens)
    exact = vectors * exact_tokens * DIM * FP32
    # Each token's and each whole page's first in int32, and where each row starts and is coded up to in int64.
    positions = batch * (num_tokens * 4 + num_tokens // 64 * 4 + 2 * 8)
    channels = vectors * DIM * num_tokens
    found = cache_bits(cache)
    assert (found.num_tokens, found.asymptotic) == (num_tokens, 4)
    assert found.codes == pytest.approx(8 * codes / channels)
    assert found.exact_tokens == pytest.approx(8 * exact / channels)
    assert found.positions == pytest.approx(8 * positions / channels)
    assert found.document()["total"] == pytest.approx(8 * (codes + exact + positions) / channels)
    assert dict(found.cache_bytes) == {"baseline": channels * FP32, "quantized": codes + exact + positions}


@torch.no_grad()
def test_dense_layers_count_on_neither_side(subject: Callable[..., Subject]) -> None:
    made, found = subject(), []
    plain = made.artifact
    one_dense = replace(plain, tables=(plain.tables[0], None))
    for artifact in (plain, one_dense):
        with attach(made.model, artifact) as attached:
            cache = attached.new_cache()
            made.model(tokens(1, 200), past_key_values=cache, use_cache=True)
            found.append(cache_bits(cache))
    assert found[1].codes == found[0].codes
    assert 2 * found[1].cache_bytes["baseline"] == found[0].cache_bytes["baseline"]
    assert cache.num_bytes().dense == 200 * SIDES * HEADS * DIM * FP32
