"""The uncompressed side's cache: what transformers' own holds and answers, without the copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chain import tiny_llama
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pqkv_cli.hf.cache_layers import InPlaceLayer, uncompressed_cache

CHANGES = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 300)),
    st.tuples(st.just("crop"), st.integers(1, 5)),
    st.tuples(st.just("reorder"), st.sampled_from([(0, 0), (1, 0), (1, 1)])),
    st.tuples(st.just("select"), st.sampled_from([(0,), (1,)])),
)


def changed(layer: DynamicLayer, change: str, how, seed: int) -> None:
    if change == "update":
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(2, 2 if not layer.get_seq_length() else len(layer.keys), 3, how, 4, generator=generator)
        returned = layer.update(*new)
        assert returned[0] is layer.keys and returned[1] is layer.values
    elif layer.get_seq_length() > 5 and len(layer.keys) == 2:
        if change == "crop":
            layer.crop(-how)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor(how))
        else:
            layer.batch_select_indices(torch.tensor(how))


@given(changes=st.lists(CHANGES, max_size=12))
@settings(max_examples=60, deadline=None)
def test_it_holds_what_transformers_layer_holds(changes: list) -> None:
    ours, theirs = InPlaceLayer(), DynamicLayer()
    for seed, (change, how) in enumerate(changes):
        for layer in (ours, theirs):
            changed(layer, change, how, seed)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_tokens_are_appended_in_place() -> None:
    layer = InPlaceLayer()
    for _ in range(2):
        layer.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4))
    before = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(200):
        layer.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before
    layer.update(torch.zeros(1, 2, 100, 4), torch.zeros(1, 2, 100, 4))
    assert layer.keys.data_ptr() != before[0] and layer.get_seq_length() == 320


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_answers_as_with_its_own_cache(padded: bool) -> None:
    model = tiny_llama()
    ids = torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : 7 * padded] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    cache = uncompressed_cache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    assert all(isinstance(layer, InPlaceLayer) for layer in cache.layers)


def test_windowed_layers_stay_as_they_are() -> None:
    config = tiny_llama().config
    config.layer_types = ["sliding_attention", *["full_attention"] * (config.num_hidden_layers - 1)]
    config.sliding_window = 16
    kinds = [type(layer) for layer in uncompressed_cache(config).layers]
    expected = [type(layer) for layer in DynamicCache(config=config).layers]
    assert kinds == [InPlaceLayer if kind is DynamicLayer else kind for kind in expected]
    assert kinds[:2] == [DynamicSlidingWindowLayer, InPlaceLayer]
