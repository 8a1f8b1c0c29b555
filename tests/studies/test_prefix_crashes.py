"""Prefixes are whole or not there: kill -9 at every operation and at any moment of `save`, many readers beside writers."""

import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import in_child, start_child
from fatal import Watch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.runtime import Attached, PrefixStore, attach, load

COMMON = tokens(1, 400, seed=1)
TEXTS = [torch.cat((COMMON, tokens(1, 200 + 64 * seed, seed=seed)), dim=1) for seed in (2, 3)]


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attached]:
    model = tiny_llama()
    with attach(model, load(fit_artifact(model, tmp_path_factory.mktemp("tiny")))) as made:
        yield made


@pytest.fixture(scope="module")
def caches(attached: Attached) -> list[Any]:
    """A cache of each text; both have read the common part in a step of its own."""
    made = [attached.new_cache() for _ in TEXTS]
    with torch.no_grad():
        for cache, ids in zip(made, TEXTS, strict=True):
            for piece in (ids[:, :400], ids[:, 400:]):
                attached.model(piece, past_key_values=cache, use_cache=True)
    return made


def is_whole(cache: Any, wanted: Any) -> bool:
    """Whether a restored cache holds what `wanted` does."""
    for layer, other in zip(cache.layers, wanted.layers, strict=True):
        for side in ("keys", "values"):
            parts = [torch.cat(list(each.pages[side].views()), dim=1) for each in (layer, other)]
            if not (torch.equal(*parts) and torch.equal(layer.window[side], other.window[side][:, :, : other.num_window])):
                return False
    return True


def sound(attached: Attached, store: PrefixStore, caches: list[Any], must_have: int) -> None:
    """The first `must_have` texts are there; of all that is there every byte is as it was."""
    assert store.verify() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, (ids, cache) in enumerate(zip(TEXTS, caches, strict=True)):
            restored, num_tokens = store.longest_prefix(attached, torch.cat((ids, ids), dim=1))
            whole = num_tokens == ids.shape[1]
            assert whole or (index >= must_have and num_tokens == 0)
            assert not whole or is_whole(restored, cache)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_killed_save_leaves_the_old_or_the_new_store(attached: Attached, caches: list[Any], tmp_path: Path) -> None:
    def save(directory: Path, fatal: int | None = None) -> Callable[[], int]:
        def act() -> int:
            watch = Watch(directory, fatal)
            PrefixStore(directory).save(attached, caches[1], TEXTS[1])
            return min(len(watch.operations), 200)

        return act

    wanted = tmp_path / "whole"
    PrefixStore(wanted).save(attached, caches[0], TEXTS[0])
    operations = in_child(save(wanted), tmp_path / "log").code
    assert 15 < operations < 200, "the exit code counts them"
    for index in range(operations):
        directory = tmp_path / f"at-{index}"
        store = PrefixStore(directory)
        store.save(attached, caches[0], TEXTS[0])
        assert in_child(save(directory, index), tmp_path / "log").code == -signal.SIGKILL
        sound(attached, store, caches, 1)
        store.prune()
        left = files(directory)
        assert left <= files(wanted) and not any(name.endswith(".tmp") for name in left), "no block that nobody needs"
        store.save(attached, caches[1], TEXTS[1])
        assert files(directory) == files(wanted)
        sound(attached, store, caches, 2)


def test_a_save_that_is_killed_at_any_moment(attached: Attached, caches: list[Any], tmp_path: Path) -> None:
    rng, store = random.Random(0), PrefixStore(tmp_path / "store")

    def save_for_ever() -> int:
        while True:
            for index in (1, 0):
                store.save(attached, caches[index], TEXTS[index])
            store.remove(store.list()[0].key)

    for _ in range(12):
        assert in_child(save_for_ever, tmp_path / "log", kill_after_s=rng.uniform(0.02, 0.2)).code == -signal.SIGKILL
        sound(attached, store, caches, 0)
    for index in (0, 1):
        store.save(attached, caches[index], TEXTS[index])
    sound(attached, store, caches, 2)
    assert not any(name.endswith(".tmp") for name in files(store.directory))


def test_ten_readers_beside_two_writers(attached: Attached, caches: list[Any], tmp_path: Path) -> None:
    store, stop = PrefixStore(tmp_path / "store"), tmp_path / "stop"
    store.save(attached, caches[0], TEXTS[0])

    def write(index: int) -> Callable[[], int]:
        def act() -> int:
            while not stop.exists():
                key = store.save(attached, caches[index], TEXTS[index]).key
                if index == 1:
                    store.remove(key)
                store.prune(max_bytes=10**9)
            return 0

        return act

    def look() -> int:
        for turn in range(25):
            sound(attached, store, caches, 1) if turn % 5 == 0 else _looked(attached, store, caches)
        return 0

    writers = [start_child(write(index), tmp_path / f"writer-{index}.log") for index in (0, 1)]
    readers = [start_child(look, tmp_path / f"reader-{index}.log") for index in range(10)]
    ended = [reader.ended() for reader in readers]
    stop.touch()
    assert [each.log for each in (*ended, *(writer.ended() for writer in writers)) if each.code] == []
    sound(attached, store, caches, 1)


def _looked(attached: Attached, store: PrefixStore, caches: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids, cache, must_have in zip(TEXTS, caches, (True, False), strict=True):
            restored, num_tokens = store.longest_prefix(attached, torch.cat((ids, ids), dim=1))
            assert num_tokens in ((ids.shape[1],) if must_have else (0, ids.shape[1]))
            assert not num_tokens or is_whole(restored, cache)
