"""What a cache weighs, by the bytes of its tensors, sinks, window and positions included."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from pqkv_cli.cache import encoder
from pqkv_cli.cache.cache import quantized_cache
from pqkv_cli.rates import key_layout, rate_layout
from pqkv_cli.runtime.attention import pqkv_attention
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.format.addresses import page_addresses
from pqkv_kernels.format.layout import PAGE_TOKENS, CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import encode

HEADS, DIM, LAYERS = 8, 128, 32  # Llama 3 8B


def blank_tables(layout: CodeLayout) -> CodecTables:
    zero = torch.zeros((), dtype=torch.float16)
    codebooks = tuple(
        tuple(zero.expand(HEADS, g.num_subspaces, g.num_centroids, g.subspace_dim) for g in stage) for stage in layout.stages
    )
    return CodecTables(layout, codebooks)


def blank_pages(x: torch.Tensor, tables: CodecTables, angles: Any = None) -> torch.Tensor:
    """Pages of the right shape whose codes are all zero: what is coded does not change what it weighs."""
    return torch.zeros(x.shape[0], x.shape[2] // PAGE_TOKENS, HEADS, tables.layout.page_bytes, dtype=torch.uint8)


def one_layer(bits: int) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=HEADS, hidden_size=4096)
    tables = {"keys": blank_tables(key_layout(bits, DIM)), "values": blank_tables(rate_layout(bits, DIM))}
    return quantized_cache(config, [tables], CacheSpec(), [None])


def fill(cache: Any, num_tokens: int, chunk: int) -> None:
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        cache.begin_step(torch.arange(start, stop)[None], None)
        states = torch.zeros(1, HEADS, stop - start, DIM, dtype=torch.bfloat16)
        cache.update(states, states, 0)


def share(cache: Any, num_tokens: int) -> float:
    held = cache.num_bytes()
    # Positions are held once for all layers.
    quantized = held.codes + held.exact + held.positions / LAYERS
    return quantized / (2 * HEADS * DIM * 2 * num_tokens)


@pytest.mark.parametrize(
    ("bits", "at_most", "chunk"), [(4, 0.27, 32768), (4, 0.27, 2000), (3, 0.21, 32768), (2, 0.145, 32768), (1, 0.085, 32768)]
)
def test_a_cache_of_32k_tokens_of_llama_3_8b(monkeypatch: pytest.MonkeyPatch, bits: int, at_most: float, chunk: int) -> None:
    monkeypatch.setattr(encoder, "encode_pages", lambda backend, *args: blank_pages(*args))
    cache = one_layer(bits)
    fill(cache, 32768, chunk)
    assert bits / 16 < share(cache, 32768) <= at_most


def test_blank_pages_have_the_shape_of_real_ones() -> None:
    tables = blank_tables(rate_layout(1, DIM))
    x = torch.zeros(1, HEADS, 128, DIM)
    assert encode(x, tables).shape == blank_pages(x, tables).shape


@pytest.mark.parametrize("num_tokens", [1, 7, 50, 64, 100, 127])
def test_a_short_text_weighs_no_more_than_uncompressed(num_tokens: int) -> None:
    cache = one_layer(4)
    fill(cache, num_tokens, num_tokens)
    assert cache.num_bytes().codes == 0
    assert cache.num_bytes().exact == 2 * HEADS * DIM * 2 * num_tokens


def test_generated_tokens_cost_at_most_one_step_of_room() -> None:
    cache = one_layer(4)
    fill(cache, 20, 1)
    assert cache.num_bytes().exact <= 2 * HEADS * DIM * 2 * (20 + 16)


def test_a_prompts_exact_states_die_with_the_handles(bench: Any) -> None:
    cache = bench.quantized()
    cache.begin_step(torch.arange(1000)[None], None)
    states = torch.randn(1, 2, 1000, 16)
    handles = cache.update(states, states.clone(), 0)
    query = torch.randn(1, 2, 1000, 16)
    pqkv_attention(torch.nn.Module(), query, *handles, None, scaling=0.25)
    alive = weakref.ref(handles[0].snapshot.exact["keys"])
    del states, handles, query
    gc.collect()
    assert alive() is None
    assert sum(t.shape[2] for t in cache.layers[0].window.values()) <= 2 * (max(bench.spec.window_tokens, 63) + 2 * PAGE_TOKENS)


@torch.no_grad()
def test_pages_are_addressed_once_until_they_change(bench: Any) -> None:
    bench.use("pqkv")
    cache = bench.quantized()
    bench.model(bench.tokens(2, 300), past_key_values=cache)
    store = cache.layers[0].pages["keys"]

    def addresses(of: Any) -> torch.Tensor:
        found = page_addresses(of.views())
        assert torch.equal(found, page_addresses(list(of.views()))) and of.views() is of.views(bench.model.device)
        return found

    known, before = addresses(store), cache.num_bytes().codes
    assert page_addresses(store.views()) is known and before >= known.nbytes
    twin = copy.deepcopy(cache).layers[0].pages["keys"]
    assert not torch.equal(addresses(twin), known)  # a copy lies elsewhere
    changes = [
        lambda: bench.model(bench.tokens(2, 130), past_key_values=cache),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.crop(-300),
        lambda: cache.batch_select_indices(torch.tensor([1])),
    ]
    for change in changes:
        change()
        assert addresses(store).shape == (store.blocks[0].shape[0], store.num_pages)
