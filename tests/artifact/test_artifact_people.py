"""What stands around an artifact: model check, summary, derived files; and the format as another reader would read it."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from artifact_maker import make_header, make_tables

from pqkv_cli.artifact.card import model_card, write_derived
from pqkv_cli.artifact.check import check_model
from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.store import open_artifact, save_artifact
from pqkv_cli.artifact.summary import summarize
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import ModelGeometry, ModelIdentity
from pqkv_kernels.format.layout import RotaryLayout


def identity(config: str = "c" * 64, weights: str = "d" * 64, former: str = "") -> ModelIdentity:
    return ModelIdentity(config, weights, former)


def geometry(header: Header) -> ModelGeometry:
    return ModelGeometry("llama", header.geometry, 4096)


def test_the_right_model_passes(saved: Path, header: Header) -> None:
    assert check_model(open_artifact(saved), identity(), geometry(header)) == ()


def test_another_model_is_refused(saved: Path, header: Header) -> None:
    artifact = open_artifact(saved)
    other = identity(weights="9" * 64)
    with pytest.raises(ArtifactError) as caught:
        check_model(artifact, other, geometry(header), label="org/fine-tune")
    for text in ("weights", "demo (dddddddddddd)", "org/fine-tune has 999999999999", "--force"):
        assert text in str(caught.value)
    assert "configuration" not in str(caught.value)
    warnings = check_model(artifact, identity("1" * 64, "2" * 64), geometry(header), force=True)
    assert [w.split(":")[0] for w in warnings] == ["configuration", "weights"]


def test_an_artifact_of_an_earlier_version_says_what_it_checks(saved: Path, header: Header) -> None:
    artifact = open_artifact(saved)
    (note,) = check_model(artifact, identity(weights="9" * 64, former="d" * 64), geometry(header))
    assert "attention weights of three layers only" in note and "could not be checked" in note
    with pytest.raises(ArtifactError, match="has 999999999999"):
        check_model(artifact, identity(weights="9" * 64, former="8" * 64), geometry(header))


def test_words_of_a_reason_are_no_geometry(saved: Path, header: Header) -> None:
    layers = tuple(
        replace(layer, dense_reason="put in other words") if layer.dense_reason else layer for layer in header.geometry
    )
    assert check_model(open_artifact(saved), identity(), ModelGeometry("llama", layers, 4096)) == ()


def test_force_cannot_bend_geometry(saved: Path, header: Header) -> None:
    artifact = open_artifact(saved)
    layers = (replace(header.geometry[0], num_kv_heads=1, rotary=RotaryLayout(8, True)), *header.geometry[1:])
    with pytest.raises(ArtifactError, match="layer 0 has 4 heads, 1 key/value.*rotary_dim 8 interleaved; expected 4"):
        check_model(artifact, identity(), ModelGeometry("llama", layers, 1), force=True)
    with pytest.raises(ArtifactError, match="it has 2 layers; expected 3"):
        check_model(artifact, identity(), ModelGeometry("llama", layers[:2], 1), force=True)


def test_summary(saved: Path) -> None:
    artifact = open_artifact(saved)
    summary = summarize(artifact)
    # keys: 4 codes of 2 bits over 8 channels; values: (2 x 2 + 3 + 4) bits and 2 x 3 bits.
    assert summary.keys_bits == 1.0
    assert summary.values_bits == (11 + 6) / 16
    assert summary.total_bits == (16 + 17) / 32
    assert summary.code_bytes_per_token == 2 * (8 + 8 + 11 + 6) / 8
    assert (summary.baseline_bytes_per_token, summary.dense_bytes_per_token) == (2 * 2 * 2 * 8 * 2, 0)
    assert (summary.table_bytes, summary.sha256, summary.cache.num_sinks) == (artifact.table_bytes, artifact.sha256, 4)
    first, _, dense = summary.layers
    assert first.keys is not None and (first.keys.codec, first.keys.mean_error, first.keys.worst_error) == ("k2", 0.1875, 0.25)
    assert first.bits_per_channel == (1.0 + 11 / 8) / 2
    assert (dense.keys, dense.values, dense.dense_reason) == (None, None, "sliding window")


def test_dense_layers_that_could_be_coded_are_counted(saved: Path, header: Header) -> None:
    free = replace(header, geometry=(*header.geometry[:2], replace(header.geometry[2], dense_reason="")))
    save_artifact(saved, free, make_tables(header))
    assert summarize(open_artifact(saved)).dense_bytes_per_token == 2 * 2 * 8 * 2
    assert summarize(open_artifact(saved)).baseline_bytes_per_token == 3 * 2 * 2 * 8 * 2


def test_derived_files_carry_the_hash(saved: Path) -> None:
    artifact = open_artifact(saved)
    paths = write_derived(saved.parent, artifact.header, [{"task": "a|b", "kl_bits": 0.0123456}, {"task": "c", "score": None}])
    first = [path.read_bytes() for path in paths]
    assert json.loads(first[0])["sha256"] == artifact.sha256
    card = first[1].decode()
    for text in (artifact.sha256, "| a\\|b | 0.01235 |  |", "attached.new_cache()", "1.031", "| v2 | values | matrix |"):
        assert text in card
    write_derived(saved.parent, artifact.header, [{"task": "a|b", "kl_bits": 0.0123456}, {"task": "c", "score": None}])
    assert [path.read_bytes() for path in paths] == first


def test_card_without_results_and_with_a_hub_id() -> None:
    header = make_header()
    assert "base_model" not in model_card(header)
    hub = replace(header, model=replace(header.model, label="org/name-1.5"))
    assert "base_model: org/name-1.5\n" in model_card(hub)
    assert "`pqkv eval` measures it" in model_card(hub)


def test_the_hash_as_the_specification_says(saved: Path) -> None:
    """An independent reader, from docs/artifact-format.md: no safetensors, no torch."""
    raw = saved.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:start])
    text = head.pop("__metadata__")["pqkv"]
    sha256 = json.loads(text)["sha256"]
    assert text.count(sha256) == 1
    digest = hashlib.sha256(text.replace(f'"sha256":"{sha256}"', '"sha256":""').encode())
    for name in sorted(head):
        shape = "x".join(map(str, head[name]["shape"]))
        begin, end = head[name]["data_offsets"]
        digest.update(f"\n{name} {head[name]['dtype']} {shape}\n".encode() + raw[start + begin : start + end])
    assert digest.hexdigest() == sha256 == open_artifact(saved).sha256


def test_reading_needs_no_tool_of_the_pipeline() -> None:
    code = (
        "import sys, pqkv_cli.artifact.store, pqkv_cli.artifact.check, pqkv_cli.artifact.summary, pqkv_cli.artifact.card;"
        "print(sorted({'yaml', 'typer', 'rich', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": _path()})
    assert run.stdout.strip() == "[]"


def _path() -> str:
    return ":".join(sys.path)
