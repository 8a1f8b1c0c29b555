"""A changed artifact is refused with an `ArtifactError`; nothing else is ever raised, and nothing large is allocated."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from artifact_maker import read_parts, write_signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pqkv_cli.artifact.store import open_artifact
from pqkv_cli.errors import ArtifactError

QUICK = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**400)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["k2", "v2", "matrix", "pre_rope", "identity", "a" * 64]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=4
)


def refuse(path: Path, data: bytes | bytearray) -> None:
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        open_artifact(path)


def test_every_byte_flipped(saved: Path) -> None:
    original = saved.read_bytes()
    for i in range(len(original)):
        data = bytearray(original)
        data[i] ^= (0x01, 0x20, 0xFF, 0x80, 0x02)[i % 5]
        refuse(saved, data)


def test_padding_is_part_of_the_format(saved: Path) -> None:
    original = saved.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    for blank in b"\t\n\r":
        for i in range(end - 8, end):
            if original[i : i + 1] == b" ":
                refuse(saved, original[:i] + bytes([blank]) + original[i + 1 :])


def test_every_truncation_and_extension(saved: Path) -> None:
    original = saved.read_bytes()
    for length in range(0, len(original), 7):
        refuse(saved, original[:length])
    for surplus in (1, 7, 4096):
        refuse(saved, original + bytes(surplus))


@QUICK
@given(data=st.data())
def test_raw_mutations(data: st.DataObject, saved: Path) -> None:
    original = _kept(saved)
    start = data.draw(st.integers(0, len(original)))
    removed = data.draw(st.integers(0, 40))
    inserted = data.draw(st.binary(max_size=40))
    mutated = original[:start] + inserted + original[start + removed :]
    if mutated != original:
        refuse(saved, mutated)


@QUICK
@given(data=st.data())
def test_header_mutations_with_a_right_hash(data: st.DataObject, saved: Path) -> None:
    """One place of the JSON is replaced, removed or doubled; what still opens must differ in data only."""
    _kept(saved)
    document, tensors = read_parts(saved.with_suffix(".kept"))
    path = data.draw(st.sampled_from(_places(document)))
    mutated = _mutate(copy.deepcopy(document), path, data)
    write_signed(saved, mutated, tensors)
    try:
        artifact = open_artifact(saved)
    except ArtifactError as error:
        assert len(str(error)) < 6000
    else:
        assert json.dumps(mutated) and path[0] not in {"format", "version", "codecs", "layers"}, path
        assert artifact.header.plan.codecs


def _kept(saved: Path) -> bytes:
    kept = saved.with_suffix(".kept")
    if not kept.exists():
        kept.write_bytes(saved.read_bytes())
    return kept.read_bytes()


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path and path != ("sha256",) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def _mutate(document: Any, path: tuple[Any, ...], data: st.DataObject) -> Any:
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    before = copy.deepcopy(parent)
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[data.draw(st.text(min_size=1, max_size=6))] = data.draw(VALUES)
    elif kind == "add":
        parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = data.draw(VALUES)
    if parent == before and [type(v) for v in _flat(parent)] == [type(v) for v in _flat(before)]:
        document["surplus"] = 1
    return document


def _flat(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)
