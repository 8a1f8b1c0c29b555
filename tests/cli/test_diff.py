"""``pqkv diff``: two artifacts side by side."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.artifact_maker import edit, make_header, make_tables

from pqkv_cli.artifact.schema import LayerError
from pqkv_cli.artifact.store import save_artifact
from pqkv_cli.specs import CacheSpec


@pytest.fixture
def first(tmp_path: Path) -> Path:
    header = make_header()
    save_artifact(tmp_path / "a.safetensors", header, make_tables(header))
    return tmp_path / "a.safetensors"


@pytest.fixture
def second(first: Path) -> Path:
    return Path(shutil.copy(first, first.with_name("b.safetensors")))


def fields(document: dict) -> dict[str, tuple]:
    return {pair["field"]: (pair["a"], pair["b"]) for pair in document["fields"]}


def test_a_copy_is_the_same(pqkv: Callable, first: Path, second: Path) -> None:
    document = pqkv("diff", first, second, "--json", "-").json
    assert (document["schema"], document["same_content"]) == ("pqkv.diff/1", True)
    assert (document["fields"], document["tensors"]) == ([], [])
    assert document["num_equal_tensors"] == 13
    assert "the same artifact twice" in pqkv("diff", first, second).out


def test_one_number_that_differs(pqkv: Callable, first: Path, second: Path) -> None:
    def nudge(document: dict, tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.values.v1.codebooks.0.0"][0, 0, 0, 0] = 100.0

    before = make_tables(make_header())[1]["values"].codebooks[0][0][0, 0, 0, 0]
    edit(second, nudge)
    document = pqkv("diff", first, second, "--json", "-").json
    assert document["tensors"] == [
        {"name": "layers.1.values.v1.codebooks.0.0", "reason": "values", "largest": 100.0 - float(before)}
    ]
    assert (document["same_content"], document["fields"], document["num_equal_tensors"]) == (False, [], 12)


def test_what_the_header_says_differently(pqkv: Callable, first: Path, second: Path) -> None:
    header = make_header()
    changed = replace(
        header,
        model=replace(header.model, label="other", weights_sha256="f" * 64),
        plan=replace(header.plan, cache=CacheSpec(8, 64)),
        relative_error=(header.relative_error[0], LayerError((0.5, 0.5), (0.1, 0.1)), None),
        recipe_sha256="b" * 64,
    )
    save_artifact(second, changed, make_tables(header))
    document = pqkv("diff", first, second, "--json", "-").json
    assert fields(document) == {
        "model.label": ("demo", "other"),
        "model.weights_sha256": ("d" * 64, "f" * 64),
        "cache.num_sinks": (4, 8),
        "recipe_sha256": ("a" * 64, "b" * 64),
    }
    assert [(layer["keys_error_a"], layer["keys_error_b"]) for layer in document["layers"]] == [
        (0.1875, 0.1875),
        (0.1875, 0.5),
        (None, None),
    ]
    assert document["tensors"] == []


def test_another_rate(pqkv: Callable, exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    assert pqkv("fit-codebooks", other, "--bits", 2, "--iterations", 2).code == 0
    assert pqkv("export", other).code == 0
    document = pqkv("diff", exported, other, "--json", "-").json
    assert (document["a"]["bits_per_channel"], document["b"]["bits_per_channel"]) == (4, 2)
    assert [(layer["bits_a"], layer["bits_b"]) for layer in document["layers"]] == [(4, 2), (4, 2)]
    assert all(layer["keys_error_a"] < layer["keys_error_b"] for layer in document["layers"])
    assert any(name.startswith("codecs.") for name in fields(document))
    answer = pqkv("diff", "--run", exported, other)
    assert (answer.code, "recipe_sha256" in answer.out, "relative squared error per layer" in answer.out) == (0, True, True)


def test_what_cannot_be_compared(pqkv: Callable, first: Path, second: Path) -> None:
    alone = pqkv("diff", first)
    assert (alone.code, "found 1 names, expected two" in alone.err) == (2, True)
    second.write_bytes(b"nothing of the kind")
    damaged = pqkv("diff", first, second)
    assert (damaged.code, str(second) in damaged.err) == (1, True)
