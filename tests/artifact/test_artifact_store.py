"""Saving and opening: round trip, same bytes for same input, whole or not at all."""

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact_maker import edit, make_header, make_tables
from safetensors import safe_open

from pqkv_cli.artifact.schema import Header, LayerError
from pqkv_cli.artifact.store import open_artifact, save_artifact
from pqkv_cli.artifact.tensors import LayerTables
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import CacheSpec, CodecSpec, CompressionPlan, LayerGeometry, LayerPlan
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout
from pqkv_kernels.format.tables import CodecTables

Tables = list[LayerTables | None]


def assert_same(found: CodecTables, expected: CodecTables) -> None:
    assert found.layout == expected.layout and found.rotary == expected.rotary
    for stage, other in zip(found.codebooks, expected.codebooks, strict=True):
        assert all(torch.equal(a, b) and a.dtype == torch.float16 for a, b in zip(stage, other, strict=True))
    for name in ("map", "permutation", "inverse"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype), name


def test_round_trip(saved: Path, header: Header, tables: Tables) -> None:
    artifact = open_artifact(saved)
    assert artifact.header == replace(header, sha256=artifact.sha256)
    assert artifact.file_bytes == saved.stat().st_size and artifact.path == saved
    assert artifact.tables[2] is None
    for found, expected in zip(artifact.tables, tables, strict=True):
        if expected is not None:
            assert found is not None and set(found) == set(expected)
            for side in expected:
                assert_same(found[side], expected[side])


def test_table_bytes_are_those_of_the_file(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert list(file.metadata()) == ["pqkv"]
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert open_artifact(saved).table_bytes == sum(t.numel() * t.element_size() for t in stored)


def test_a_directory_stands_for_the_file_in_it(saved: Path) -> None:
    assert open_artifact(saved.parent).sha256 == open_artifact(str(saved)).sha256


def test_same_input_same_bytes(saved: Path, header: Header, tmp_path: Path) -> None:
    again = tmp_path / "deep" / "again.safetensors"
    reordered = CompressionPlan(dict(reversed(header.plan.codecs.items())), header.plan.layers, header.plan.cache)
    sha256 = save_artifact(again, replace(header, plan=reordered, sha256="f" * 64), make_tables(header))
    assert again.read_bytes() == saved.read_bytes()
    assert sha256 == open_artifact(saved).sha256


def test_saving_what_was_opened_changes_nothing(saved: Path, tmp_path: Path) -> None:
    artifact = open_artifact(saved)
    save_artifact(tmp_path / "copy", artifact.header, artifact.tables)
    assert (tmp_path / "copy").read_bytes() == saved.read_bytes()


def test_an_identity_permutation_is_one_format(saved: Path, header: Header, tables: Tables) -> None:
    layer = tables[1]
    assert layer is not None
    explicit = replace(layer["values"], permutation=torch.arange(8).repeat(2, 1))
    before = saved.read_bytes()
    save_artifact(saved, header, [tables[0], {"keys": layer["keys"], "values": explicit}, None])
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("fp32 codebook", {"codebooks": lambda t: ((t.codebooks[0][0].float(),),)}, "wrong type or shape: F32 [2, 4, 4, 2]"),
        ("no map", {"map": lambda t: None}, "layers.0.keys.k2.map is missing"),
        ("another rotary", {"rotary": lambda t: RotaryLayout(4)}, "not of the codec the header names"),
        ("zero scale", {"map": lambda t: torch.zeros_like(t.map)}, "is zero"),
        ("not finite", {"map": lambda t: t.map / 0}, "not finite"),
    ],
)
def test_a_writer_keeps_the_readers_laws(
    name: str, change: dict, text: str, header: Header, tables: Tables, tmp_path: Path
) -> None:
    layer = tables[0]
    assert layer is not None
    bad = replace(layer["keys"], **{field: make(layer["keys"]) for field, make in change.items()})
    with pytest.raises(ArtifactError, match="cannot save") as caught:
        save_artifact(tmp_path / "new", header, [{**layer, "keys": bad}, *tables[1:]])
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[:2], "tables are given for 2 layers; expected 3"),
        (lambda t: [None, *t[1:]], "layer 0 has no tables for its keys"),
        (lambda t: [t[0], t[1], t[0]], "layers [2], which the header leaves dense"),
        (lambda t: [{"keys": t[0]["values"], "values": t[0]["values"]}, *t[1:]], "not of the codec"),
    ],
)
def test_tables_that_do_not_fit_the_header(change, text: str, header: Header, tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        save_artifact(tmp_path / "new", header, change(tables))
    assert text in str(caught.value)


def test_a_header_with_a_fault_is_not_written(header: Header, tables: Tables, tmp_path: Path) -> None:
    for bad in (
        replace(header, recipe_sha256="short"),
        replace(header, relative_error=(LayerError((float("nan"),) * 2, (0.0, 0.0)), *header.relative_error[1:])),
        replace(header, kernels={"x": {"y": object()}}),  # type: ignore[dict-item]
    ):
        with pytest.raises(ArtifactError, match="cannot save"):
            save_artifact(tmp_path / "new", bad, tables)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_artifact(call: str, saved: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ArtifactError, match="disk is full.*free some space"):
            save_artifact(saved, header, make_tables(header, seed=1))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_short_writes_are_continued(saved: Path, header: Header, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = saved.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    save_artifact(saved, header, tables)
    assert saved.read_bytes() == before


def test_an_interrupt_removes_the_temporary_file(
    saved: Path, header: Header, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(saved, header, tables)
    assert list(saved.parent.iterdir()) == [saved]


def test_an_unwritable_place(saved: Path, header: Header, tables: Tables) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_artifact(saved / "below_a_file" / "x", header, tables)
    with pytest.raises(ArtifactError):
        save_artifact("nul\0byte", header, tables)


def test_a_tiny_channel_scale_is_not_singular(saved: Path) -> None:
    """A gauge change of the model scales columns of the map; that alone must never refuse an artifact."""

    def shrink(document: dict, tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.values.v2.map"][:, :, 3] *= 2.0**-30

    edit(saved, shrink)
    open_artifact(saved)


def test_ten_megabytes_open_fast(tmp_path: Path) -> None:
    codecs = {
        "k": CodecSpec(CodeLayout.uniform(64, 32, 8), "scale", "pre_rope"),
        "v": CodecSpec(CodeLayout.uniform(64, 32, 8), "matrix"),
    }
    num_layers = 36
    header = replace(
        make_header(),
        geometry=(LayerGeometry(4, 4, 64, RotaryLayout(64)),) * num_layers,
        plan=CompressionPlan(codecs, (LayerPlan("k", "v"),) * num_layers, CacheSpec()),
        relative_error=(LayerError((0.1,) * 4, (0.1,) * 4),) * num_layers,
    )
    save_artifact(tmp_path, header, make_tables(header))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        artifact = open_artifact(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert artifact.file_bytes > 10_000_000
    assert min(seconds) < 0.6  # 0.1 s on an idle core
