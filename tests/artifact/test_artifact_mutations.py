"""A changed artifact is refused with an `ArtifactError`; nothing else is ever raised, and nothing large is allocated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_maker import read_parts, write_signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import breaks_a_law, changed_document, misled, spliced, truncated

from pqkv_cli.artifact.store import open_artifact
from pqkv_cli.errors import ArtifactError

QUICK = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
@pytest.mark.parametrize("change", [truncated, spliced, misled])
def test_raw_mutations(change: Callable, data: st.DataObject, saved: Path) -> None:
    original = _kept(saved)
    mutated = data.draw(change(original))
    if mutated != original:
        refuse(saved, mutated)


@QUICK
@given(data=st.data())
def test_header_mutations_with_a_right_hash(data: st.DataObject, saved: Path) -> None:
    """One place of the JSON is replaced, removed or doubled; what still opens must differ in data only."""
    _kept(saved)
    document, tensors = read_parts(saved.with_suffix(".kept"))
    path, mutated = data.draw(changed_document(document))
    write_signed(saved, mutated, tensors)
    try:
        artifact = open_artifact(saved)
    except ArtifactError as error:
        assert len(str(error)) < 6000
    else:
        assert json.dumps(mutated) and not breaks_a_law(path, document, mutated), path
        assert artifact.header.plan.codecs


def _kept(saved: Path) -> bytes:
    kept = saved.with_suffix(".kept")
    if not kept.exists():
        kept.write_bytes(saved.read_bytes())
    return kept.read_bytes()


@pytest.mark.parametrize(
    ("change", "refused"),
    [({"dense": "other words"}, False), ({"dense": ""}, True), ({"dense": 3}, True), ({"dense": "x", "more": 1}, True)],
)
def test_a_reason_may_be_said_otherwise(saved: Path, change: dict, refused: bool) -> None:
    document, tensors = read_parts(saved)
    index = next(i for i, layer in enumerate(document["layers"]) if isinstance(layer.get("dense"), str))
    changed = document | {"layers": [*document["layers"][:index], change, *document["layers"][index + 1 :]]}
    assert breaks_a_law(("layers", index, "dense"), document, changed) is refused
    write_signed(saved, changed, tensors)
    if refused:
        with pytest.raises(ArtifactError):
            open_artifact(saved)
    else:
        assert open_artifact(saved).header.plan.layers[index].dense_reason == "other words"
