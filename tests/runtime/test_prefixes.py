"""A restored prefix goes on, bit for bit, as the cache that was stored: every kind of layer, way to generate and length."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation_paths import PATHS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from prefix_support import filled, goes_on, read
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.errors import CacheError, UsageError
from pqkv_cli.runtime import Artifact, Attached, PrefixStore, attach, load
from pqkv_cli.specs import CacheSpec

SPECS = [CacheSpec(4, 64), CacheSpec(0, 0), CacheSpec(3, 100), CacheSpec(70, 10)]


def same_state(a: Any, b: Any) -> bool:
    """Whether two caches hold the same codes, exact tokens and positions, in the same places.

    Of the sinks those count whose slots pages hold; others lie in the window, and the sinks are read for none of them.
    """
    pairs = [(a.slots.positions, b.slots.positions), (a.slots.row_start, b.slots.row_start)]
    for one, two in zip(a.quantized_layers, b.quantized_layers, strict=True):
        if (one.first_exact, one.num_window, one.num_coded) != (two.first_exact, two.num_window, two.num_coded):
            return False
        for side in ("keys", "values"):
            parts = [torch.cat(list(each.pages[side].views()), dim=1) for each in (one, two) if each.num_coded]
            pairs += [tuple(parts)] if parts else []
            pairs.append((one.window[side][:, :, : one.num_window], two.window[side][:, :, : two.num_window]))
            held = [each.sinks[side][:, :, : max(each.num_coded - int(a.slots.row_start.min()), 0)] for each in (one, two)]
            pairs.append((held[0], held[1]))
    return all(torch.equal(x, y) for x, y in pairs)


FAMILIES = (
    "llama",  # full attention
    "smollm3",  # a layer without rotary embedding
    "phi3",  # rotary embedding of half the channels
    "gemma2",  # sliding windows, softcap
    "gemma3n_text",  # sliding windows, layers that read earlier caches
    "gpt_oss",  # sliding windows, attention sink logits, yarn
    "llama4_text",  # chunked attention
    "qwen3_next",  # linear attention
    "lfm2",  # convolutions
    "doge",  # attention that decodes
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [(190,), (70, 1, 1, 118)], ids=["at once", "in steps"])
def test_every_kind_of_layer(
    name: str, steps: tuple[int, ...], family_case: Callable[[str], tuple[Any, Artifact]], tmp_path: Path
) -> None:
    ids = tokens(1, 240, seed=3)
    with attach(*family_case(name)) as attached:
        live, store = filled(attached, ids[:, :190], steps), PrefixStore(tmp_path)
        store.save(attached, live, ids[:, :190])
        restored, num_tokens = store.longest_prefix(attached, ids)
        assert num_tokens == 190 and same_state(restored, live)
        assert restored.num_bytes().dense == live.num_bytes().dense
        twin = copy.deepcopy(live)
        # Chunks that fill pages, single tokens, and what generate makes of it.
        expected = read(attached, live, ids[:, 190:], (1, 40, 1, 8))
        assert torch.equal(read(attached, restored, ids[:, 190:], (1, 40, 1, 8)), expected)
        again, _ = store.longest_prefix(attached, ids)
        assert torch.equal(goes_on(attached, again, ids), goes_on(attached, twin, ids))


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_every_rate(bits: int, tmp_path: Path) -> None:
    model, ids = tiny_llama(), tokens(1, 300, seed=4)
    with attach(model, load(fit_artifact(model, tmp_path, bits))) as attached:
        live, store = filled(attached, ids[:, :280]), PrefixStore(tmp_path / "store")
        store.save(attached, live, ids[0, :280].tolist())
        restored = store.longest_prefix(attached, ids).cache
        assert torch.equal(read(attached, restored, ids[:, 280:]), read(attached, live, ids[:, 280:]))


# What reads the prompt itself, in transformers of today, goes on from no cache that holds tokens, stored or not.
FROM_NOTHING = ("prompt lookup", "assistant")
# Earlier versions cut the whole prompt into chunks, and the mask for what they are without the cache: 5.17 does, 5.24 does not.
CHUNKS_FROM_A_CACHE = Version(transformers.__version__) >= Version("5.24")


@pytest.mark.parametrize("path", [path for path in PATHS if path not in FROM_NOTHING])
def test_every_way_to_generate(path: str, model: Any, artifact: Artifact, tmp_path: Path) -> None:
    options = {key: value for key, value in PATHS[path].items() if key not in ("rows", "padded")}
    if "prefill_chunk_size" in options:
        options["prefill_chunk_size"] = 7
    ids = tokens(1, 200, seed=2)
    with attach(model, artifact) as attached:
        live, store = filled(attached, ids[:, :150]), PrefixStore(tmp_path)
        store.save(attached, live, ids[:, :150])
        restored = store.longest_prefix(attached, ids).cache
        for cache in (live, restored):
            cache.batch_repeat_interleave(max(options.get("num_beams", 1), options.get("num_return_sequences", 1)))
        if path == "chunked prefill" and not CHUNKS_FROM_A_CACHE:
            for cache in (live, restored):
                with pytest.raises(CacheError, match=r"attention_mask is \[1, 7\]; expected \[1, 157\]"):
                    goes_on(attached, cache, ids, **options)
            return
        assert torch.equal(goes_on(attached, restored, ids, **options), goes_on(attached, live, ids, **options))


def test_a_prefix_grows_turn_by_turn(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    """What was restored can be stored again when it has read more, and is then as good as the cache that never left memory."""
    ids = tokens(1, 600, seed=6)
    with attach(model, artifact) as attached:
        live, store = attached.new_cache(), PrefixStore(tmp_path)
        for stop in (1, 63, 64, 65, 130, 400, 590):
            restored, begun = store.longest_prefix(attached, ids)
            assert begun == live.get_seq_length()
            read(attached, live, ids[:, begun:stop])
            read(attached, restored, ids[:, begun:stop])
            assert same_state(restored, live)
            store.save(attached, restored, ids[:, :stop])
        expected = goes_on(attached, live, ids)
        assert torch.equal(goes_on(attached, store.longest_prefix(attached, ids).cache, ids), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("padding", [0, 70])
def test_one_row_of_a_batch(
    name: str, padding: int, family_case: Callable[[str], tuple[Any, Artifact]], tmp_path: Path
) -> None:
    ids, store = tokens(3, 260, seed=8), PrefixStore(tmp_path)
    mask = (torch.arange(200) >= torch.tensor([[padding], [0], [0]])).long()
    with attach(*family_case(name)) as attached, torch.no_grad():
        live = attached.new_cache()
        attached.model(ids[:, :200], attention_mask=mask, past_key_values=live, use_cache=True)
        if padding:
            with pytest.raises(CacheError, match=r"row 0 begins with 70 tokens of padding.*expected a row without padding"):
                store.save(attached, live, ids[0, :200])
        store.save(attached, live, ids[1, :200], row=1)
        with pytest.raises(CacheError, match="row 3 is asked for and the cache has 3; expected one of 0 to 2"):
            store.save(attached, live, ids[1, :200], row=3)
        restored, num_tokens = store.longest_prefix(attached, ids[1])
        before = live.num_bytes().total
        twin = copy.deepcopy(live)
        twin.reorder_cache(torch.tensor([1]))
        assert num_tokens == 200 and same_state(restored, twin)
        assert torch.equal(read(attached, restored, ids[1:2, 200:]), read(attached, twin, ids[1:2, 200:]))
        assert live.num_bytes().total == before and len(live.slots.starts()) == 3


@pytest.fixture(scope="module")
def by_spec(artifact: Artifact) -> Iterator[Callable[[CacheSpec], Attached]]:
    with ExitStack() as stack:
        made = {spec: stack.enter_context(attach(tiny_llama(), artifact, cache=spec)) for spec in SPECS}
        yield made.__getitem__


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    steps=st.lists(st.sampled_from([1, 2, 4, 63, 64, 65, 100, 128, 191]), min_size=1, max_size=4),
    rest=st.lists(st.sampled_from([1, 2, 63, 64, 65, 130]), min_size=1, max_size=3),
)
def test_any_steps_before_and_after(
    spec: CacheSpec, steps: list[int], rest: list[int], by_spec: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    attached, held, ids = by_spec(spec), sum(steps), tokens(1, sum(steps) + sum(rest), seed=10)
    live, store = filled(attached, ids[:, :held], steps), PrefixStore(tmp_path_factory.mktemp("store"))
    store.save(attached, live, ids[:, :held])
    restored, num_tokens = store.longest_prefix(attached, ids)
    assert num_tokens == held and same_state(restored, live)
    assert torch.equal(read(attached, restored, ids[:, held:], rest), read(attached, live, ids[:, held:], rest))
    assert same_state(restored, live)


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    steps=st.lists(st.sampled_from([1, 5, 63, 64, 65, 127, 150]), min_size=2, max_size=4),
    more=st.sampled_from([1, 2, 40, 64]),
)
@example(spec=CacheSpec(70, 10), steps=[127, 1], more=1)  # the longer text has stored sinks that the shorter has in its window
def test_a_text_that_shares_less_than_is_stored(
    spec: CacheSpec, steps: list[int], more: int, by_spec: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Either the cache of the common part, which reads the same tokens as codes and the same exact, or none."""
    common, held = sum(steps[:-1]), sum(steps)
    ids, other = tokens(1, held, seed=11), tokens(1, more, seed=12)
    other[0, 0] = (ids[0, common] - 1) % 200 + 2
    text = torch.cat((ids[:, :common], other), dim=1)
    attached = by_spec(spec)
    reference = filled(attached, ids[:, :common], steps[:-1])
    whole = copy.deepcopy(reference)
    read(attached, whole, ids[:, common:])
    store = PrefixStore(tmp_path_factory.mktemp("store"))
    stored = store.save(attached, whole, ids)
    restored, num_tokens = store.longest_prefix(attached, text)
    kept = whole.quantized_layers[0].first_exact
    # What the row of the common part reads exact must be there.
    fits = kept <= max(common - spec.window_tokens, 0) // 64 * 64
    assert num_tokens == (common if fits else 0)
    assert stored.header.shape.shortest <= max(held - 63, 1)
    if not num_tokens:
        assert restored.get_seq_length() == 0
        return
    # Exact tokens that nobody reads exact any more may be gone; then sums are taken over fewer zeros.
    is_same = same_state(restored, reference)
    assert is_same or kept > reference.quantized_layers[0].first_exact
    found, expected = (read(attached, cache, text[:, common:]) for cache in (restored, reference))
    assert torch.equal(restored.slots.stops(), reference.slots.stops())
    assert torch.equal(found, expected) or not is_same
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_same_prompt_again_leaves_its_last_token(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    ids = tokens(1, 191, seed=13)
    with attach(model, artifact) as attached:
        live, store = filled(attached, ids), PrefixStore(tmp_path)
        store.save(attached, live, ids)
        restored, num_tokens = store.longest_prefix(attached, ids)
        assert num_tokens == restored.get_seq_length() == 190
        live.crop(-1)
        assert torch.equal(goes_on(attached, restored, ids), goes_on(attached, live, ids))


@pytest.mark.parametrize("name", ["qwen3_next", "gemma2"])
def test_states_that_cannot_go_back_serve_whole_prefixes_only(
    name: str, family_case: Callable[[str], tuple[Any, Artifact]], tmp_path: Path
) -> None:
    ids, store = tokens(1, 100, seed=14), PrefixStore(tmp_path)
    with attach(*family_case(name)) as attached:
        assert store.save(attached, filled(attached, ids[:, :99]), ids[:, :99]).header.shape.shortest == 99
        assert store.longest_prefix(attached, ids[:, :99]).num_tokens == 0
        assert store.longest_prefix(attached, ids).num_tokens == 99
        if name == "gemma2":  # windows of 40 tokens that are not full yet
            ids = tokens(1, 30, seed=15)
            live = filled(attached, ids)
            store.save(attached, live, ids)
            restored, num_tokens = store.longest_prefix(attached, ids)
            assert num_tokens == 29
            live.crop(-1)
            assert torch.equal(goes_on(attached, restored, ids), goes_on(attached, live, ids))


def test_the_longest_of_several_serves(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    ids, store = tokens(1, 300, seed=16), PrefixStore(tmp_path)
    with attach(model, artifact) as attached:
        assert store.longest_prefix(attached, ids).num_tokens == 0
        for length in (10, 250, 100):
            store.save(attached, filled(attached, ids[:, :length]), ids[:, :length])
        for asked, served in ((300, 250), (251, 250), (250, 249), (129, 128), (128, 100), (11, 10), (2, 1), (1, 0)):
            assert store.longest_prefix(attached, ids[:, :asked]).num_tokens == served, asked


def test_what_cannot_be_stored_is_refused(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    ids, store = tokens(1, 20), PrefixStore(tmp_path)
    with attach(model, artifact) as attached:
        with pytest.raises(CacheError, match="the cache holds no tokens; expected a text"):
            store.save(attached, attached.new_cache(), ids)
        live = filled(attached, ids)
        with pytest.raises(CacheError, match="the cache holds 20 tokens and 19 ids are given; expected one for each"):
            store.save(attached, live, ids[:, :19])
        with pytest.raises(UsageError, match=r"token_ids have the shape \[2, 20\]; expected those of one row"):
            store.save(attached, live, tokens(2, 20))
        gaps = attached.new_cache()
        with torch.no_grad():
            attached.model(ids, position_ids=torch.arange(20)[None] * 2, past_key_values=gaps, use_cache=True)
        with pytest.raises(CacheError, match="positions with gaps; expected positions that follow one by one"):
            store.save(attached, gaps, ids)
        with attach(tiny_llama(), artifact) as other, pytest.raises(CacheError, match="the cache was made for another model"):
            store.save(other, live, ids)
        assert list(tmp_path.iterdir()) == []


def test_positions_that_begin_elsewhere_stay(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    ids, store, offset = tokens(1, 200, seed=17), PrefixStore(tmp_path), 300

    def step(cache: Any, start: int, stop: int) -> torch.Tensor:
        positions = torch.arange(offset + start, offset + stop)[None]
        with torch.no_grad():
            return model(ids[:, start:stop], position_ids=positions, past_key_values=cache, use_cache=True).logits

    with attach(model, artifact) as attached:
        live = attached.new_cache()
        step(live, 0, 180)
        store.save(attached, live, ids[:, :180])
        restored = store.longest_prefix(attached, ids).cache
        assert torch.equal(step(restored, 180, 200), step(live, 180, 200))


def test_codes_in_the_memory_of_the_cpu(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    ids, store = tokens(1, 200, seed=18), PrefixStore(tmp_path)
    with attach(model, artifact) as attached:
        live = attached.new_cache(offload=True)
        read(attached, live, ids[:, :190])
        store.save(attached, live, ids[:, :190])
        assert torch.equal(goes_on(attached, store.longest_prefix(attached, ids).cache, ids), goes_on(attached, live, ids))


def test_a_restored_cache_is_an_ordinary_one(model: Any, artifact: Artifact, tmp_path: Path) -> None:
    """It can be copied, grow rows, be cropped and be emptied."""
    ids, store = tokens(1, 260, seed=19), PrefixStore(tmp_path)
    with attach(model, artifact) as attached:
        live = filled(attached, ids[:, :250])
        store.save(attached, live, ids[:, :250])
        restored = copy.deepcopy(store.longest_prefix(attached, ids).cache)
        for cache in (live, restored):
            cache.crop(-100)
            cache.batch_repeat_interleave(2)
        more = tokens(2, 80, seed=20)
        assert torch.equal(read(attached, restored, more), read(attached, live, more))
        restored.reset()
        assert restored.get_seq_length() == 0 and restored.num_bytes().total == 0
