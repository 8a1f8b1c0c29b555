"""Ways to change an artifact: cut it, change its raw bytes, change its header and sign it anew. Draws with hypothesis."""

import copy
from typing import Any

from hypothesis import strategies as st

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
# Fields of the header whose every change must be refused, even where the hash is right; but see `breaks_a_law`.
LAWS = frozenset({"format", "version", "codecs", "layers"})
# Numbers that a length, an offset or a shape must not be believed.
_LIES = st.sampled_from([0, 1, 2**15, 2**22, 2**31 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**64])


@st.composite
def truncated(draw: st.DrawFn, original: bytes) -> bytes:
    """Return `original` without its end, half the time within its head."""
    head = 8 + int.from_bytes(original[:8], "little")
    return original[: draw(st.integers(0, draw(st.sampled_from([head, len(original) - 1]))))]


@st.composite
def spliced(draw: st.DrawFn, original: bytes) -> bytes:
    """Return `original` with some bytes replaced by others, as many or not, somewhere."""
    start = draw(st.integers(0, len(original)))
    removed = draw(st.integers(0, 40))
    inserted = draw(st.binary(max_size=40))
    return original[:start] + inserted + original[start + removed :]


@st.composite
def misled(draw: st.DrawFn, original: bytes) -> bytes:
    """Return `original` with another length of its head, or with one number within its head replaced by a lie."""
    if draw(st.booleans()):
        return min(draw(_LIES), 2**64 - 1).to_bytes(8, "little") + original[8:]
    length = int.from_bytes(original[:8], "little")
    head = original[8 : 8 + length]
    digits = [i for i, byte in enumerate(head) if chr(byte).isdigit()]
    start = stop = draw(st.sampled_from(digits))
    while stop < length and chr(head[stop]).isdigit():
        stop += 1
    lied = head[:start] + str(draw(_LIES)).encode() + head[stop:]
    return len(lied).to_bytes(8, "little") + lied + original[8 + length :]


@st.composite
def changed_document(draw: st.DrawFn, document: Any) -> tuple[tuple[Any, ...], Any]:
    """Return a place of `document` and a copy in which what stands there is replaced, removed or doubled."""
    path = draw(st.sampled_from(places(document)))
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    before = copy.deepcopy(parent)
    kind = draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(min_size=1, max_size=6))] = draw(VALUES)
    elif kind == "add":
        parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = draw(VALUES)
    if parent == before and [type(v) for v in _flat(parent)] == [type(v) for v in _flat(before)]:
        changed["surplus"] = 1
    return path, changed


def breaks_a_law(path: tuple[Any, ...], document: Any, changed: Any) -> bool:
    """Return whether a reader must refuse `document` as it was `changed` at `path`; other words for a reason are no lie."""
    if path[0] not in LAWS:
        return False
    old, new = document, changed
    for key in path[:-1]:
        old, new = old[key], new[key]
    in_words = (
        path[-1] == "dense" and isinstance(old["dense"], str) and isinstance(new.get("dense"), str) and new["dense"] != ""
    )
    return not (in_words and old.keys() == new.keys())


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value inside a JSON document, but to its hash."""
    found = [path] if path and path != ("sha256",) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def _flat(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)
