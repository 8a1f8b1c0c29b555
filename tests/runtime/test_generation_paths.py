"""All of generate() on two more families, token for token against a dense cache of the decoded values."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_model
from tiny_chain import fit_artifact, tokens

from pqkv_cli.runtime import Attached, attach, load

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from oracle import oracle_cache

NEW = 24


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def attached(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = family_model(request.param)
    artifact = load(fit_artifact(model, tmp_path_factory.mktemp(request.param)))
    with attach(model, artifact) as made:
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
    "sampling": dict(rows=2, padded=True, do_sample=True, top_k=8),
    "beams": dict(rows=2, padded=True, num_beams=3),
    "several-sequences": dict(rows=1, do_sample=True, num_return_sequences=3),
    "beams-sampled": dict(rows=1, do_sample=True, num_beams=2, num_return_sequences=2),
    "prompt-lookup": dict(rows=1, prompt_lookup_num_tokens=4),
    "chunked-prefill": dict(rows=2, padded=True, prefill_chunk_size=48),
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


def test_an_assistant_proposes_tokens(attached: Attached) -> None:
    ids = tokens(1, 150, seed=8)
    assistant = family_model("llama")
    found = generate(attached, attached.new_cache(), ids, assistant_model=assistant)
    assert torch.equal(found, generate(attached, oracle(attached), ids, "eager", assistant_model=assistant))


def test_several_turns_on_one_cache(attached: Attached) -> None:
    results = []
    for cache, attention in ((attached.new_cache(), "pqkv"), (oracle(attached), "eager")):
        ids = tokens(1, 130, seed=9)
        for turn in range(3):
            ids = generate(attached, cache, ids, attention)
            ids = torch.cat((ids, tokens(1, 20 + turn, seed=turn)), dim=1)
        results.append(ids)
    assert torch.equal(*results)


def test_tokens_stream(attached: Attached) -> None:
    class Collector:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            self.seen.append(torch.tensor([-1]))

    ids, collector = tokens(1, 150, seed=10), Collector()
    made = generate(attached, attached.new_cache(), ids, streamer=collector)
    assert torch.equal(torch.cat(collector.seen), torch.cat((made[0], torch.tensor([-1]))))


def test_codes_in_the_memory_of_the_cpu_change_nothing(attached: Attached) -> None:
    ids = tokens(2, 200, seed=11)
    cache = attached.new_cache(offload=True)
    found = generate(attached, cache, ids)
    assert torch.equal(found, generate(attached, attached.new_cache(), ids))
    layer = cache.quantized_layers[0]
    before = [view.clone() for view in layer.pages["keys"].views()]
    layer.prefetch()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.pages["keys"].views(), strict=True))


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


def test_a_static_cache_leaves_the_attached_model_what_it_was(attached: Attached) -> None:
    ids = tokens(1, 60, seed=13)
    found = generate(attached, None, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, generate(attached, None, ids, "eager"))
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(attached, attached.new_cache(), ids, cache_implementation="static")
