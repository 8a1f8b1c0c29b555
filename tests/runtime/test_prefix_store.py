"""What a store does with its files: shares blocks, keeps limits, refuses what is not whole or not its owner's."""

import copy
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_support import filled, goes_on, read
from safetensors import safe_open
from tiny_chain import byte_tokenizer, fit_artifact, tiny_llama, tokens

from pqkv_cli.errors import CacheError, UsageError
from pqkv_cli.hf.layer_state import taken_apart
from pqkv_cli.runtime import Artifact, Attached, PrefixStore, PrefixWarning, attach, load
from pqkv_cli.runtime.prefix_files import header_text, packed, unpacked
from pqkv_cli.specs import CacheSpec


@pytest.fixture
def attached(model: Any, artifact: Artifact) -> Any:
    with attach(model, artifact) as made:
        yield made


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def block_names(directory: Path) -> set[str]:
    return {path.name for path in (directory / "blocks").iterdir()}


def saved(attached: Attached, store: PrefixStore, length: int, seed: int = 0) -> Any:
    ids = tokens(1, length, seed=seed)
    return store.save(attached, filled(attached, ids), ids)


def test_a_second_document_stores_only_the_rest(attached: Attached, tmp_path: Path) -> None:
    common, store = tokens(1, 600, seed=1), PrefixStore(tmp_path)
    texts = [torch.cat((common, tokens(1, 200, seed=seed)), dim=1) for seed in (2, 3)]
    live = [filled(attached, ids, (600, 200)) for ids in texts]
    first = store.save(attached, live[0], texts[0])
    before = bytes_on_disk(tmp_path)
    assert first.num_bytes == first.own_bytes == before == store.num_bytes()
    store.save(attached, live[1], texts[1])
    first, second = (store.find(each.key) for each in sorted(store.list(), key=lambda each: each.key != first.key))
    grown = bytes_on_disk(tmp_path) - before
    shared = {sha for sha, _ in first.header.blocks} & {sha for sha, _ in second.header.blocks}
    assert len(shared) == 2, "of 600 common tokens 512 lie in two whole blocks"
    assert grown == second.own_bytes < second.num_bytes == first.num_bytes
    per_page = sum(t.num_heads * t.layout.page_bytes for layer in live[0].quantized_layers for t in layer.tables.values())
    assert second.num_bytes - second.own_bytes > 8 * per_page
    assert store.num_bytes() == bytes_on_disk(tmp_path)
    for ids, cache in zip(texts, live, strict=True):
        text = torch.cat((ids, tokens(1, 20, seed=4)), dim=1)
        restored = store.longest_prefix(attached, text)
        assert restored.num_tokens == 800
        assert torch.equal(goes_on(attached, restored.cache, text), goes_on(attached, cache, text))
    store.remove(first.key)
    assert bytes_on_disk(tmp_path) == store.find(second.key).num_bytes
    assert store.longest_prefix(attached, torch.cat((texts[1], texts[0]), dim=1)).num_tokens == 800
    store.remove(second.key)
    assert bytes_on_disk(tmp_path) == 0 and store.list() == ()


def test_a_text_that_is_read_again_shares_too(attached: Attached, tmp_path: Path) -> None:
    """Another text with the same beginning, read from its first token on, has the same codes there."""
    store, common = PrefixStore(tmp_path), tokens(1, 600, seed=1)
    for seed in (2, 3):
        ids = torch.cat((common, tokens(1, 200, seed=seed)), dim=1)
        stored = store.save(attached, filled(attached, ids), ids)
    sizes = [(tmp_path / "blocks" / f"{sha}.safetensors").stat().st_size for sha, _ in stored.header.blocks]
    assert stored.num_bytes - stored.own_bytes == sum(sizes[:2]) > 0


def test_the_same_prefix_twice_is_one(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    first = saved(attached, store, 300)
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert saved(attached, store, 300).key == first.key
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == names and len(store.list()) == 1
    # Read in other steps its codes may be others; the blocks of the former are gone then.
    ids = tokens(1, 300)
    again = store.save(attached, filled(attached, ids, (100, 200)), ids)
    assert again.key == first.key
    assert block_names(tmp_path) == {f"{sha}.safetensors" for sha, _ in again.header.blocks}


def test_files_are_safetensors_that_others_can_open(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    stored = saved(attached, store, 300)
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_tensor(name).shape) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        if file.parent == tmp_path:
            header = json.loads(metadata["pqkv_prefix"])
            assert (header["format"], header["version"]) == ("pqkv-prefix", 1)
            assert header["tokens"] == tokens(1, 300)[0].tolist()
            assert shapes["layers.0.keys.sinks"] == (2, 4, 16)
            assert [pages for _, pages in header["blocks"]] == [pages for _, pages in stored.header.blocks] == [4]
        else:
            assert shapes["layers.1.values"][:2] == (4, 2)


def test_limits_remove_what_was_not_used_for_longest(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    keys = [saved(attached, store, 300, seed).key for seed in range(4)]
    for age, key in enumerate(reversed(keys)):
        os.utime(tmp_path / f"{key}.safetensors", (time.time() - 100 * age - 50,) * 2)
    ids = torch.cat((tokens(1, 300), tokens(1, 5, seed=9)), dim=1)
    assert store.longest_prefix(attached, ids).num_tokens == 300  # the oldest becomes the newest
    assert [each.key for each in store.list()] == [keys[0], keys[3], keys[2], keys[1]]
    assert store.prune() == ()
    one = store.list()[0].num_bytes
    removed = store.prune(max_bytes=3 * one)
    assert [(each.key, each.num_bytes) for each in removed] == [(keys[1], one)]
    assert store.num_bytes() == bytes_on_disk(tmp_path) <= 3 * one
    assert [each.key for each in store.prune(max_age=100)] == [keys[2]]
    limited = PrefixStore(tmp_path, max_bytes=2 * one)
    newest = saved(attached, limited, 300, 7).key
    assert [each.key for each in limited.list()] == [newest, keys[0]]
    with pytest.raises(CacheError, match=r"the prefix weighs \d+ bytes and the store may weigh 1000; expected less"):
        saved(attached, PrefixStore(tmp_path, max_bytes=1000), 300, 8)
    assert len(limited.list()) == 2
    aged = PrefixStore(tmp_path, max_age=1e-6)
    assert [each.key for each in aged.list()] != [saved(attached, aged, 300, 9).key]
    assert len(aged.list()) == 1, "what is stored now is kept, whatever the limit"
    assert bytes_on_disk(tmp_path) == aged.num_bytes()


@pytest.mark.parametrize("limits", [dict(max_bytes=0), dict(max_age=-1.0), dict(max_age=float("inf"))])
def test_impossible_limits(limits: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a positive number, or None"):
        PrefixStore(tmp_path, **limits)


def test_a_flipped_byte_anywhere_is_found(attached: Attached, tmp_path: Path) -> None:
    store, ids = PrefixStore(tmp_path), tokens(1, 300)
    stored = saved(attached, store, 300)
    assert store.verify() == ()
    for file in sorted(tmp_path.rglob("*.safetensors")):
        data = file.read_bytes()
        step = 7 if len(data) < 4000 else 397
        for place in (*range(0, 300), *range(300, len(data), step)):
            changed = bytearray(data)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            with pytest.raises(CacheError):
                store.load(attached, stored.key)
            if place % 50 == 0:
                assert [key for key, _ in store.verify()] == [stored.key]
        file.write_bytes(data)
    assert torch.equal(
        read(attached, store.load(attached, stored.key), ids[:, :5]), read(attached, filled(attached, ids), ids[:, :5])
    )


@pytest.mark.parametrize("size", [0, 7, 8, 200, -1])
def test_files_that_were_cut_off_are_refused(size: int, attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    stored = saved(attached, store, 300)
    ids = torch.cat((tokens(1, 300), tokens(1, 5, seed=9)), dim=1)
    for file in sorted(tmp_path.rglob("*.safetensors")):
        data = file.read_bytes()
        file.write_bytes(data[:size])
        with pytest.raises(CacheError, match=r"expected .*"):
            store.load(attached, stored.key)
        with pytest.warns(PrefixWarning, match="is not used: its .*; expected|is not used: it "):
            assert store.longest_prefix(attached, ids).num_tokens == 0
        assert len(store.verify()) == 1
        file.write_bytes(data)
    assert store.longest_prefix(attached, ids).num_tokens == 300


def test_a_missing_block_and_a_file_of_another_name(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    stored = saved(attached, store, 300)
    file, block = tmp_path / f"{stored.key}.safetensors", next((tmp_path / "blocks").iterdir())
    file.rename(tmp_path / "other.safetensors")
    with pytest.raises(CacheError, match=f"its file is called other and holds the prefix {stored.key}; expected the same"):
        store.load(attached, "other")
    (tmp_path / "other.safetensors").rename(file)
    block.unlink()
    with pytest.raises(CacheError, match=r"its block \w{12} is missing; expected all of them: remove it with"):
        store.load(attached, stored.key)
    assert [fault for _, fault in store.verify()] == [
        f"its block {block.name[:12]} is missing; expected all of them: remove it with `pqkv prefix remove` and store it again"
    ]
    saved(attached, store, 300)  # stored again, it is whole again
    assert store.verify() == () and store.load(attached, stored.key).get_seq_length() == 300


def test_a_damaged_block_is_written_anew_by_the_next_prefix(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    stored = saved(attached, store, 300)
    block = next((tmp_path / "blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-1] + b"?")
    saved(attached, store, 300)
    assert store.verify() == () and store.load(attached, stored.key).get_seq_length() == 300


def other_weights(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama(1), artifact, force=True)


def other_rotary(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama(rope_parameters=dict(rope_type="default", rope_theta=5000.0)), artifact, force=True)


def other_artifact(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama(), load(fit_artifact(tiny_llama(), tmp_path, bits=2)))


def other_spec(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama(), artifact, cache=CacheSpec(4, 128))


def other_sinks(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama(), artifact, cache=CacheSpec(0, 64))


def other_format(artifact: Artifact, tmp_path: Path) -> Any:
    return attach(tiny_llama().bfloat16(), artifact)


@pytest.mark.filterwarnings("ignore:configuration")
@pytest.mark.filterwarnings("ignore:weights")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (other_weights, r"weights of the model: stored with \w{12}, here \w{12}; expected the same: load the model that"),
        (
            other_rotary,
            r"rotary settings: stored with \w{12}, here \w{12}; expected the same: load the model with the",
        ),
        (other_artifact, r"artifact: stored with \w{12}, here \w{12}; expected the same: attach the artifact that"),
        (other_spec, "window: stored with 64, here 128; expected the same: attach with the same CacheSpec"),
        (other_sinks, "number of sinks: stored with 4, here 0; expected the same: attach with the same CacheSpec"),
        (other_format, "number format: stored with float32, here bfloat16; expected the same: load the model in that format"),
    ],
)
def test_another_owner_is_refused(
    other: Callable[..., Any], message: str, model: Any, artifact: Artifact, tmp_path: Path
) -> None:
    store, ids = PrefixStore(tmp_path / "store"), torch.cat((tokens(1, 150), tokens(1, 5, seed=9)), dim=1)
    with attach(model, artifact) as attached:
        stored = saved(attached, store, 150)
    with other(artifact, tmp_path) as attached:
        with pytest.raises(CacheError, match=message):
            store.load(attached, stored.key)
        with pytest.warns(PrefixWarning, match=message):
            cache, num_tokens = store.longest_prefix(attached, ids)
        assert num_tokens == cache.get_seq_length() == 0
        # A prefix of its own stands beside the other, and nobody is told of that then.
        assert saved(attached, store, 150).key != stored.key
        assert store.longest_prefix(attached, ids).num_tokens == 150


def test_another_tokenizer_is_refused_where_both_are_named(attached: Attached, tmp_path: Path) -> None:
    store, ids, tokenizer = PrefixStore(tmp_path), tokens(1, 151), byte_tokenizer()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    stored = store.save(attached, filled(attached, ids[:, :150]), ids[:, :150], tokenizer=tokenizer)
    tokenizer(["some text", "more"], max_length=4, truncation=True)  # changes what the next call does, no more
    assert store.load(attached, stored.key, tokenizer=tokenizer).get_seq_length() == 150
    assert store.longest_prefix(attached, ids).num_tokens == 150
    with pytest.raises(CacheError, match=r"tokenizer: stored with \w{12}, here \w{12}; expected the same: use the tokenizer"):
        store.load(attached, stored.key, tokenizer=other)


def test_tokens_are_compared_and_not_only_hashed(attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids = PrefixStore(tmp_path), tokens(1, 150)
    saved(attached, store, 150)
    other = ids.clone()
    other[0, 40] = 2 + (other[0, 40] - 1) % 200
    assert store.longest_prefix(attached, torch.cat((other, ids), dim=1)).num_tokens == 40
    (entry,) = store._index.scan()[0]
    with pytest.raises(CacheError, match="its tokens are not those of the text"):
        store._restored(store_reader(attached), entry, 150, other[0].tolist())


def store_reader(attached: Attached) -> Any:
    from pqkv_cli.runtime.prefix_owner import owner_of
    from pqkv_cli.runtime.prefixes import _Reader

    return _Reader(attached, owner_of(attached))


def test_a_file_of_another_version_is_left_alone(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    keys = [saved(attached, store, 300, seed).key for seed in (0, 1)]
    file = tmp_path / f"{keys[0]}.safetensors"
    header, tensors = unpacked(bytearray(file.read_bytes()), keys[0])
    file.write_bytes(packed(header_text(header).replace('"version":1', '"version":2'), tensors))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(CacheError, match="it is of version 2; this pqkv reads version 1: use the pqkv that wrote it"):
        store.load(attached, keys[0])
    for change in (lambda: store.remove(keys[1]), store.prune, lambda: saved(attached, store, 100)):
        with pytest.raises(CacheError, match="nothing was changed, because its blocks are not known"):
            change()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    store.remove(keys[0])  # asked for by name
    assert [each.key for each in store.list()] == [keys[1]]


# Two new blocks and the file of the prefix: three files, each synced, and after each its directory.
@pytest.mark.parametrize(
    ("call", "nth"),
    [*((call, n) for call in ("open", "write", "replace") for n in range(3)), *(("fsync", n) for n in range(6))],
)
def test_a_full_disk_changes_nothing(
    call: str, nth: int, attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(tmp_path)
    stored = saved(attached, store, 300)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    ids = torch.cat((tokens(1, 300), tokens(1, 300, seed=5)), dim=1)
    live, real, calls = filled(attached, ids), getattr(os, call), []

    def full(*args: Any, **options: Any) -> Any:
        watched = call != "open" or (args[1] & os.O_CREAT and ".tmp" in str(args[0]))
        calls.append(call) if watched else None
        if watched and len(calls) > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CacheError, match="the disk is full|cannot be synced"):
            store.save(attached, live, ids)
    assert store.verify() == ()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    if (call, nth) == ("fsync", 5):  # all is written; what fails is the last directory's way to the disk
        assert len(store.list()) == 2 and after.items() > before.items()
    else:
        assert [each.key for each in store.list()] == [stored.key] and after == before


def test_a_store_that_may_not_be_written_still_serves(
    attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(tmp_path / "store")
    saved(attached, store, 300)
    ids = torch.cat((tokens(1, 300), tokens(1, 5, seed=9)), dim=1)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "utime", refuse)
    assert store.longest_prefix(attached, ids).num_tokens == 300
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot be changed: .*expected a directory to write to: choose another place"):
        saved(attached, PrefixStore(tmp_path / "file"), 100)


def test_the_example_of_the_page_runs(model: Any, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "prefixes.md").read_text(encoding="utf-8")
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "artifact").symlink_to(artifact.path)
    monkeypatch.chdir(tmp_path)
    inputs = byte_tokenizer()("abcdefghij" * 15, return_tensors="pt", return_token_type_ids=False)
    known: dict[str, Any] = dict(model=model, inputs=inputs)
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for held in (0, inputs["input_ids"].shape[1] - 1):
        exec(compile(example, "docs/prefixes.md", "exec"), known)
        assert known["num_tokens"] == held
    for name in ("save", "longest_prefix", "load", "list", "find", "remove", "prune", "verify", "num_bytes"):
        assert f"`{name}(" in page and hasattr(PrefixStore, name)


def test_names(attached: Attached, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    assert store.list() == () and store.verify() == () and store.prune() == () and not store.num_bytes()
    keys = [saved(attached, store, 100 + seed, seed).key for seed in range(20)]
    assert store.find(keys[0][:10]).key == keys[0]
    with pytest.raises(CacheError, match=r"there is no prefix 'nothing' in .*; expected one of 20: see them with `pqkv prefix"):
        store.find("nothing")
    twice = next(first for first in "0123456789abcdef" if sum(key.startswith(first) for key in keys) > 1)
    with pytest.raises(CacheError, match=f"prefixes in .* begin with '{twice}'; expected one: give more of it"):
        store.find(twice)
    with pytest.raises(CacheError, match="there is no prefix"):
        store.remove(keys[0], "nothing")
    assert len(store.list()) == 20


def test_files_of_others_in_the_directory_stay(attached: Attached, tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    foreign = [tmp_path / "letter.txt", tmp_path / "blocks" / "model.safetensors"]
    for file in foreign:
        file.write_text("mine")
    store = PrefixStore(tmp_path)
    store.remove(saved(attached, store, 300).key)
    assert [file.read_text() for file in foreign] == ["mine", "mine"]
    assert block_names(tmp_path) == {"model.safetensors"}


def test_a_store_can_be_moved(attached: Attached, tmp_path: Path) -> None:
    stored = saved(attached, PrefixStore(tmp_path / "here"), 300)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert PrefixStore(tmp_path / "there").load(attached, stored.key).get_seq_length() == 300


def test_layers_that_hold_something_else_are_refused() -> None:
    class Layer:
        def __init__(self, held: Any) -> None:
            self.held = held

    with pytest.raises(CacheError, match=r"a cache layer of this model holds a set \(held\); expected tensors and numbers"):
        taken_apart(Layer({1, 2}))
    with pytest.raises(CacheError, match=r"holds torch.complex64 \(layers.0.held\); expected a type that safetensors knows"):
        packed("", {"layers.0.held": torch.zeros(2, dtype=torch.complex64)})


def test_a_model_without_artifact_is_refused(attached: Attached, tmp_path: Path) -> None:
    live = filled(attached, tokens(1, 20))
    attached.artifact = None
    with pytest.raises(CacheError, match="the model was attached without an artifact; expected one"):
        PrefixStore(tmp_path).save(attached, live, tokens(1, 20))


def test_another_kind_of_layer_is_refused(attached: Attached, tmp_path: Path) -> None:
    from pqkv_cli.cache.one_row import put_row, take_row

    held = take_row(filled(attached, tokens(1, 20)))
    cache = attached.new_cache()
    cache.layers[1] = type("OtherLayer", (), {})()  # type: ignore[call-overload]
    with pytest.raises(CacheError, match="layer 1 of the stored prefix is a layer of codes, this model's is a OtherLayer"):
        put_row(cache, held, 20, lambda _: torch.device("cpu"))
    assert replace(held.shape, first_exact=0).cut(10, 64).num_slots == 10
