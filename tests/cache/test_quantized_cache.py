import copy
import itertools

import pytest
import torch

from pqkv_cli.cache.lazy_states import LazyStates
from pqkv_cli.errors import CacheError
from pqkv_kernels.format.rotary import PageAngles


@torch.no_grad()
def logits_in_steps(bench, cache, tokens, steps, attention, mask=None):
    """Feed `tokens` in pieces of the sizes `steps` and return all logits."""
    bench.use(attention)
    out, start = [], 0
    for size in steps:
        piece = tokens[:, start : start + size]
        seen = None if mask is None else mask[:, : start + size]
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start : start + size]
        out.append(bench.model(piece, attention_mask=seen, position_ids=positions, past_key_values=cache).logits)
        start += size
    return torch.cat(out, dim=1)


@torch.no_grad()
def logits_after(bench, cache, tokens, steps, attention, mask):
    """Feed `tokens` in pieces behind what `cache` holds; `mask` covers both."""
    held, out = cache.get_seq_length(), []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    bench.use(attention)
    for start, stop in itertools.pairwise(itertools.accumulate(steps, initial=0)):
        piece = slice(held + start, held + stop)
        options = dict(attention_mask=mask[:, : held + stop], position_ids=positions[:, piece], past_key_values=cache)
        out.append(bench.model(tokens[:, start:stop], **options).logits)
    return torch.cat(out, dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("steps", [[200, *[1] * 70], [7, 300, 1, 64, 63, 1, 1], [64, 64, 64, 64], [1] * 140])
def test_attention_over_codes_equals_the_dense_oracle(bench, steps) -> None:
    tokens = bench.tokens(2, sum(steps))
    quantized = bench.quantized()
    found = logits_in_steps(bench, quantized, tokens, steps, "pqkv")
    close(found, logits_in_steps(bench, bench.oracle(), tokens, steps, "sdpa"))
    assert quantized.num_materialized == 0 and quantized.get_seq_length() == sum(steps)


def test_other_attention_functions_decode_and_are_counted(bench) -> None:
    tokens, steps = bench.tokens(2, 330), [300, *[1] * 30]
    quantized = bench.quantized()
    found = logits_in_steps(bench, quantized, tokens, steps, "sdpa")
    close(found, logits_in_steps(bench, bench.oracle(), tokens, steps, "sdpa"))
    assert quantized.num_materialized == 2 * 2 * len(steps)


@pytest.mark.parametrize("piece", [1, 40])
def test_left_padded_rows_equal_their_unbatched_runs(bench, piece) -> None:
    """Also long after their own tokens became codes, and whatever pieces the text comes in."""
    lengths, more = [1, 7, 64, 300, 330], 240
    rows = [bench.tokens(1, length + more, seed=length) for length in lengths]
    longest = max(lengths)
    padding = [torch.zeros(1, longest - n, dtype=torch.long) for n in lengths]
    tokens = torch.cat([torch.cat(both, 1) for both in zip(padding, rows, strict=True)])
    mask = torch.stack([(torch.arange(longest + more) >= longest - n).long() for n in lengths])
    steps = [piece] * (more // piece)
    quantized = bench.quantized()
    batched = logits_in_steps(bench, quantized, tokens, [longest, *steps], "pqkv", mask)
    decoded = logits_in_steps(bench, bench.oracle(), tokens, [longest, *steps], "sdpa", mask)
    close(batched[mask.bool()], decoded[mask.bool()])
    coded = quantized.slots.stops() - quantized.slots.starts()
    assert int(coded.min()) >= 64
    if bench.spec.window_tokens < 63:
        return  # then a padded row's page may have to wait for slots of the page that holds its end
    assert coded.tolist() == [(n + more - piece - bench.spec.window_tokens) // 64 * 64 for n in lengths]
    for index, n in enumerate(lengths):
        alone = logits_in_steps(bench, bench.quantized(), rows[index], [n, *steps], "pqkv")
        close(batched[index : index + 1, longest - n :], alone)


@pytest.mark.parametrize("steps", [[270, *[1] * 10], [483], [446], [191, 1]])
@pytest.mark.parametrize("removed", [1, 30, 64, 66, 90, 99, 130, 190])
def test_crop_follows_the_same_rule_as_the_oracle(bench, steps, removed) -> None:
    """Also right after a prompt, of which no step has read anything as code yet; and in a row with padding."""
    tokens, more = bench.tokens(2, sum(steps)), bench.tokens(2, 90, seed=9)
    mask = (torch.arange(sum(steps) + 90) >= torch.tensor([[0], [9]])).long()
    kept = sum(steps) - removed
    later = torch.cat((mask[:, :kept], mask[:, -90:]), dim=1)
    results = []
    for cache, attention in ((bench.quantized(), "pqkv"), (bench.oracle(), "sdpa")):
        logits_in_steps(bench, cache, tokens, steps, attention, mask[:, : sum(steps)])
        cache.crop(-removed)
        assert cache.get_seq_length() == kept
        results.append(logits_after(bench, cache, more, [20, *[1] * 70], attention, later))
    real = mask[:, -90:].bool()
    close(*(result[real] for result in results))


def test_an_empty_cache_is_cropped_to_nothing(bench) -> None:
    cache = bench.quantized()
    cache.crop(0)
    assert cache.get_seq_length() == 0


def test_reordering_and_selecting_rows(bench) -> None:
    tokens = bench.tokens(2, 210)
    caches = [bench.quantized(), bench.oracle()]
    results = []
    for cache, attention in zip(caches, ("pqkv", "sdpa"), strict=True):
        logits_in_steps(bench, cache, tokens, [210], attention)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        results.append(logits_in_steps(bench, cache, bench.tokens(3, 5), [1] * 5, attention))
    close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 48},
    ],
    ids=["greedy", "beams", "sampling", "prompt-lookup", "chunked-prefill"],
)
def test_generate_gives_the_oracle_tokens(bench, options) -> None:
    prompt = bench.tokens(1, 150)
    results = []
    for cache, attention in ((bench.quantized(), "pqkv"), (bench.oracle(), "sdpa")):
        bench.use(attention)
        torch.manual_seed(3)
        results.append(bench.model.generate(prompt, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, **options))
    assert torch.equal(*results)


def test_deepcopy_and_reset(bench) -> None:
    tokens = bench.tokens(1, 200)
    cache = bench.quantized()
    logits_in_steps(bench, cache, tokens, [200], "pqkv")
    twin = copy.deepcopy(cache)
    for layer, copied in zip(cache.quantized_layers, twin.quantized_layers, strict=True):
        assert copied.tables is not layer.tables and all(copied.tables[side] is layer.tables[side] for side in layer.tables)
    more = bench.tokens(1, 4, seed=2)
    first = logits_in_steps(bench, cache, more, [1] * 4, "pqkv")
    assert torch.equal(first, logits_in_steps(bench, twin, more, [1] * 4, "pqkv"))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes().codes == 0
    fresh = logits_in_steps(bench, bench.quantized(), tokens, [200], "pqkv")
    assert torch.equal(logits_in_steps(bench, cache, tokens, [200], "pqkv"), fresh)


def test_reported_bytes_are_those_of_the_tensors_held(bench) -> None:
    cache = bench.quantized()
    logits_in_steps(bench, cache, bench.tokens(2, 400), [333, *[1] * 67], "pqkv")
    held = {}

    def walk(thing):
        if isinstance(thing, torch.Tensor):
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                walk(value)
        elif isinstance(thing, PageAngles):
            walk(thing.base)  # its steps inside a page are the same for every text
        elif type(thing).__module__.startswith(("pqkv_cli.cache", "transformers.cache_utils")):
            for name, value in vars(thing).items():
                # The same for every text, or gone next step.
                if name not in {"tables", "_angles", "_steps", "_unread", "angle_source"}:
                    walk(value)

    walk(cache)
    assert cache.num_bytes().total == sum(held.values())


def test_stale_handles_refuse_and_fresh_ones_are_cheap(bench) -> None:
    cache = bench.quantized()
    cache.begin_step(torch.arange(3)[None], None)
    keys, values = cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
    assert isinstance(keys, LazyStates) and keys.shape == (1, 2, 3, 16)
    assert (keys + 0).shape == values.shape
    cache.begin_step(torch.arange(3, 4)[None], None)
    cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    with pytest.raises(CacheError, match="valid until the layer's next update"):
        keys + 0


def test_misuse_is_named(bench) -> None:
    cache = bench.quantized()
    with pytest.raises(CacheError, match="attach"):
        cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
    logits_in_steps(bench, cache := bench.quantized(), bench.tokens(2, 5), [5], "pqkv")
    with pytest.raises(CacheError, match="a step of 3 rows on a cache of 2 rows"):
        logits_in_steps(bench, cache, bench.tokens(3, 5), [5], "pqkv")
    right = torch.tensor([[1, 1, 1, 0, 0]])
    with pytest.raises(CacheError, match="left padding"):
        bench.model(bench.tokens(1, 5), attention_mask=right, past_key_values=bench.quantized())
    with pytest.raises(CacheError, match=r"crop\(3\)"):
        cache.layers[0].crop(3)
    cache.begin_step(torch.arange(5, 6)[None].expand(2, 1), None)
    with pytest.raises(CacheError, match="one model, dtype, device"):
        cache.update(torch.randn(2, 2, 1, 16).half(), torch.randn(2, 2, 1, 16).half(), 0)


def test_a_failed_step_leaves_the_cache_usable(bench) -> None:
    tokens = bench.tokens(1, 100)
    cache = bench.quantized()
    logits_in_steps(bench, cache, tokens, [100], "pqkv")
    cache.begin_step(torch.arange(100, 107)[None], None)  # a step that died before any layer was updated
    more = bench.tokens(1, 3, seed=4)
    twin = bench.quantized()
    logits_in_steps(bench, twin, tokens, [100], "pqkv")
    assert torch.equal(logits_in_steps(bench, cache, more, [3], "pqkv"), logits_in_steps(bench, twin, more, [3], "pqkv"))
