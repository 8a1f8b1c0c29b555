"""Ten processes look at one artifact while another exports it again and again: each sees the old or the new one, whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from artifact_maker import make_header, make_tables
from children import pqkv, start_child

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.store import save_artifact

_READERS, _LOOKS = 10, 4


def longer(header: Header) -> Header:
    """Return `header` of a model with one dense layer more."""
    plan = replace(header.plan, layers=(*header.plan.layers, header.plan.layers[-1]))
    geometry, errors = (*header.geometry, header.geometry[-1]), (*header.relative_error, None)
    return replace(header, geometry=geometry, plan=plan, relative_error=errors)


def test_each_sees_the_old_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "artifact" / "pqkv.safetensors"
    variants = [(header, make_tables(header)) for header in (make_header(), longer(make_header()))]
    known = {save_artifact(place, *variant): len(variant[0].geometry) for variant in variants}

    def export_again() -> int:
        while not (tmp_path / "stop").exists():
            for variant in variants:
                save_artifact(place, *variant)
        return 0

    def look(reader: int) -> Callable[[], int]:
        def act() -> int:
            verbs = [("verify", "inspect")[(reader + turn) % 2] for turn in range(_LOOKS)]
            return max(pqkv(verb, place, "--json", tmp_path / f"{reader}-{i}.json")() for i, verb in enumerate(verbs))

        return act

    writer = start_child(export_again, tmp_path / "writer.log")
    readers = [start_child(look(reader), tmp_path / f"reader-{reader}.log") for reader in range(_READERS)]
    ended = [child.ended() for child in readers]
    (tmp_path / "stop").touch()
    assert writer.ended().code == 0
    assert [each.log for each in ended if each.code] == []
    seen = [_seen(json.loads(file.read_text())) for file in tmp_path.glob("*-?.json")]
    assert len(seen) == _READERS * _LOOKS
    assert [(sha256, layers) for sha256, layers in seen if sha256 not in known or layers not in (None, known[sha256])] == []
    assert list(place.parent.iterdir()) == [place]


def _seen(document: dict) -> tuple[str, int | None]:
    """Return the hash that was seen and, of `inspect`, the number of layers."""
    if "passed" in document:
        assert document["passed"]
        return document["sha256"], None
    return document["artifact"]["sha256"], len(document["artifact"]["layers"])
