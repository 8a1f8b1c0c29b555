"""Beside the paths of every family: more options of generate(), a compiled model, a static cache."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import tokens

from pqkv_cli.runtime import Attached, attach

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from oracle import oracle_cache

NEW = 24


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def attached(request: Any, family_case: Callable[[str], Any]) -> Any:
    with attach(*family_case(request.param)) as made:
        yield made


def oracle(attached: Attached) -> Any:
    return oracle_cache(attached.model.config, attached._tables, attached.spec, attached._angles)


def generate(attached: Attached, cache: Any, ids: torch.Tensor, attention: str = "pqkv", **options: Any) -> torch.Tensor:
    attached.model.set_attn_implementation(attention)
    torch.manual_seed(5)
    settings = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=1)
    try:
        return attached.model.generate(ids, past_key_values=cache, **{**settings, **options})
    finally:
        attached.model.set_attn_implementation("pqkv")


def padded(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    return mask


PATHS: dict[str, Any] = {
    "greedy": dict(rows=2, padded=True),
    "beams-sampled": dict(rows=1, do_sample=True, num_beams=2, num_return_sequences=2),
    "repetition-penalty": dict(rows=1, repetition_penalty=1.3),
}


@pytest.mark.parametrize("path", list(PATHS))
def test_tokens_are_the_oracles(attached: Attached, path: str) -> None:
    options = dict(PATHS[path])
    ids = tokens(options.pop("rows"), 150, seed=7)
    mask = padded(ids) if options.pop("padded", False) else torch.ones_like(ids)
    cache = attached.new_cache()
    found = generate(attached, cache, ids, attention_mask=mask, **options)
    expected = generate(attached, oracle(attached), ids, "eager", attention_mask=mask, **options)
    assert found.shape[1] == 150 + NEW
    assert torch.equal(found, expected)
    assert cache.num_materialized == 0


def test_a_compiled_model_gives_the_same_tokens(attached: Attached) -> None:
    ids, steps = tokens(1, 156, seed=12), (150, *[1] * 6)
    results = []
    for forward in (attached.model.forward, torch.compile(attached.model.forward, backend="eager")):
        cache = attached.new_cache()
        with torch.no_grad():
            pieces = [forward(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(steps, dim=1)]
        results.append(torch.cat(pieces, dim=1))
        assert cache.num_materialized == 0
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_graphs_of_a_compiled_model_break_only_at_the_cache(attached: Attached) -> None:
    ids, cache = tokens(1, 151, seed=12), attached.new_cache()
    with torch.no_grad():
        attached.model(ids[:, :150], past_key_values=cache, use_cache=True)
        told = torch._dynamo.explain(attached.model.forward)(ids[:, 150:], past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    assert told.break_reasons
    for reason in told.break_reasons:
        assert any(name in reason.reason for name in ("QuantizedLayer.update", "pqkv_attention")), reason


def test_a_static_cache_leaves_the_attached_model_what_it_was(attached: Attached) -> None:
    ids = tokens(1, 60, seed=13)
    found = generate(attached, None, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, generate(attached, None, ids, "eager"))
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(attached, attached.new_cache(), ids, cache_implementation="static")
