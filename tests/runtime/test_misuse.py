"""What people get wrong with a cache: each thing is refused by name, or right with one warning."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_chain import tiny_llama, tokens

from pqkv_cli.errors import CacheError
from pqkv_cli.runtime import Artifact, attach, simulate_artifact


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def test_a_cache_serves_the_model_that_gave_it(model: Any, artifact: Artifact) -> None:
    other = tiny_llama()
    with attach(model, artifact) as attached, attach(other, artifact) as second:
        cache = attached.new_cache()
        with pytest.raises(CacheError, match="made for another model"):
            step(other, cache, tokens(1, 5))
        step(model, cache, tokens(1, 5))
        step(model, copy.deepcopy(cache), tokens(1, 5))
        with pytest.raises(CacheError, match="made for another model"):
            step(model, second.new_cache(), tokens(1, 5))
    with (
        simulate_artifact(model, artifact) as simulation,
        attach(other, artifact),
        pytest.raises(CacheError, match="made for another model"),
    ):
        step(other, simulation.new_cache(), tokens(1, 5))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_right_and_warns_once(model: Any, artifact: Artifact, attention: str) -> None:
    ids = tokens(1, 200)
    with attach(model, artifact) as attached:
        expected = step(model, cache := attached.new_cache(), ids)
        expected = torch.cat([expected, *(step(model, cache, tokens(1, 1)) for _ in range(3))], dim=1)
        model.set_attn_implementation(attention)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = step(model, cache := attached.new_cache(), ids)
            found = torch.cat([found, *(step(model, cache, tokens(1, 1)) for _ in range(3))], dim=1)
    assert [str(w.message)[:46] for w in caught] == ["keys and values are decoded as a whole at ever"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_text_beyond_the_models_positions_warns_once(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = attached.new_cache()
        step(model, cache, tokens(1, 1023))
        assert caught == []
        for _ in range(3):
            step(model, cache, tokens(1, 1))
    assert [str(w.message) for w in caught] == [
        "the text reaches 1025 tokens and the model was made for 1024; what it says beyond them is not to be trusted: "
        "shorten the prompt, or ask for fewer new tokens"
    ]


def test_another_batch_size_in_the_next_turn_is_refused(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        step(model, cache, tokens(2, 100))
        with pytest.raises(CacheError, match="a step of 1 rows on a cache of 2 rows"):
            step(model, cache, tokens(1, 3))
        assert step(model, cache, tokens(2, 1)).shape[:2] == (2, 1)


@pytest.mark.parametrize("change", [dict(dtype=torch.float16), dict(device="meta")], ids=["dtype", "device"])
def test_states_of_another_kind_are_refused(model: Any, artifact: Artifact, change: dict[str, Any]) -> None:
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        step(model, cache, tokens(1, 10))
        cache.begin_step(torch.tensor([[10]]), None)
        strange = torch.zeros(1, 2, 1, 16).to(**change)
        with pytest.raises(CacheError, match="a cache serves one model, dtype, device and batch"):
            cache.update(strange, strange, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(model: Any, artifact: Artifact, dtype: torch.dtype) -> None:
    ids = tokens(1, 250)
    with attach(model, artifact) as attached:
        expected = torch.cat([step(model, cache := attached.new_cache(), ids[:, :200]), step(model, cache, ids[:, 200:])], 1)
    half = tiny_llama().to(dtype)
    # Single precision rounded to fp16 is not what rounding to bf16 hashes, so fp16 asks for force.
    with pytest.warns(match="weights") if dtype == torch.float16 else nullcontext():
        attached = attach(half, artifact, force=dtype == torch.float16)
    with attached:
        cache = attached.new_cache()
        found = torch.cat([step(half, cache, ids[:, :200]), step(half, cache, ids[:, 200:])], 1).float()
        exact = step(half, None, ids).float()
    assert found.isfinite().all() and cache.num_materialized == 0
    assert (found - expected).square().mean() < 0.1 * expected.var()
    assert (found - exact).square().mean() < 0.1 * exact.var()
