"""Every broken law has its own message."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_maker import edit, read_parts, write_signed
from safetensors.torch import save

from pqkv_cli.artifact.schema import canonical_json
from pqkv_cli.artifact.store import open_artifact
from pqkv_cli.errors import ArtifactError

Document = dict[str, Any]
Tensors = dict[str, torch.Tensor]
BOOK = "layers.0.keys.k2.codebooks.0.0"


def group(document: Document) -> Document:
    return document["codecs"]["v2"]["stages"][0]["groups"][1]


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def poke(name: str, index: tuple[int, ...], value: float) -> Callable[[Document, Tensors], None]:
    def change(document: Document, tensors: Tensors) -> None:
        tensors[name][index] = value

    return change


CHANGES: list[tuple[Callable[[Document, Tensors], object], str]] = [
    # format and version
    (lambda d, t: d.update(format="gguf"), "the format is \"gguf\"; expected 'pqkv'"),
    (lambda d, t: d.update(version=2), "format version is 2; this pqkv reads version 1"),
    (lambda d, t: d.update(version="1"), 'format version is "1"; this pqkv reads version 1'),
    (lambda d, t: d.update(version=True), "format version is true"),
    (lambda d, t: d.update(version=2, novelty=1), "format version is 2"),
    # fields
    (lambda d, t: d.update(novelty={}), 'the header has the unknown field "novelty"'),
    (lambda d, t: d.update(modle=d.pop("model")), "the header has the unknown field \"modle\" (did you mean 'model'?)"),
    (lambda d, t: group(d).update(nbit=3), "codecs.v2.stages[0].groups[1] has the unknown field"),
    (lambda d, t: group(d).pop("nbits"), "codecs.v2.stages[0].groups[1] lacks the field 'nbits'"),
    (lambda d, t: d.pop("cache"), "the header lacks the field 'cache'"),
    (lambda d, t: group(d).update(nbits="8"), 'codecs.v2.stages[0].groups[1].nbits is "8"; expected an integer'),
    (lambda d, t: group(d).update(nbits=13), "groups[1].nbits is 13; expected at most 12"),
    (lambda d, t: group(d).update(nbits=True), "groups[1].nbits is true; expected an integer"),
    (lambda d, t: group(d).update(M=10**60), f"groups[1].M is 1{39 * '0'}... (61 characters); expected at most 32767"),
    (lambda d, t: group(d).update(M=1.0), "groups[1].M is 1.0; expected an integer"),
    (lambda d, t: d["model"].update(label=""), 'model.label is ""; expected a string of printable characters, not empty'),
    (lambda d, t: d["model"].update(label="\x1b[31m"), 'model.label is "\\u001b[31m"; expected a string of printable'),
    (lambda d, t: d["model"].update(label="\ud800"), 'model.label is "\\ud800"; expected a string of printable'),
    (lambda d, t: d["model"].update(config_sha256="ABC"), 'model.config_sha256 is "ABC"; expected a SHA-256'),
    (lambda d, t: d["model"].update(num_layers=4), "model.num_layers is 4; expected 3, as geometry has"),
    (lambda d, t: d.update(geometry={}), "geometry is {}; expected an array"),
    (lambda d, t: d.update(cache=None), "cache is null; expected an object with the fields num_sinks, window_tokens"),
    (lambda d, t: d["cache"].update(num_sinks=-1), "cache.num_sinks is -1; expected at least 0"),
    (lambda d, t: d["geometry"][0]["rotary"].update(rotary_dim=3), "geometry[0].rotary: rotary_dim is 3; expected a positive"),
    (lambda d, t: d["geometry"][0]["rotary"].update(interleaved=0), "[0].rotary.interleaved is 0; expected true or false"),
    (lambda d, t: d["relative_error"][0].update(keys=[-1.0, 0]), "relative_error[0].keys[0] is -1.0; expected a finite number"),
    (lambda d, t: d["relative_error"][0].update(keys=[10**400, 0]), "(401 characters); expected a finite number of at least 0"),
    (lambda d, t: d["kernels"].update(decode={"x": [1]}), "kernels.decode.x is [1]; expected an integer from 0, a"),
    (lambda d, t: d["calibration"].update(seed=None), "calibration.seed is null; expected an integer"),
    # codecs
    (lambda d, t: d["codecs"]["k2"].update(kind="vq"), "codecs.k2.kind is \"vq\"; expected 'pq'"),
    (lambda d, t: d["codecs"]["k2"].update(key_space="rope"), "key_space is \"rope\"; expected 'pre_rope' or 'post_rope'"),
    (lambda d, t: d["codecs"]["k2"].update(map="pairscale"), "k2: map is \"pairscale\" (did you mean 'pair_scale'?); ex"),
    (lambda d, t: d["codecs"]["k2"].update(map="matrix"), '"matrix"; expected one of identity, pair_scale, pair_metric with'),
    (lambda d, t: d["codecs"]["v2"].update(map="pair_scale"), "expected one of identity, scale, matrix with key_space null"),
    (lambda d, t: d["codecs"].update({f"x{i}": d["codecs"]["v1"] for i in range(3)}), "expected a length of at most 6, not 7"),
    (lambda d, t: d["codecs"].update({"a.b": d["codecs"]["v1"]}), 'codecs.a.b is "a.b"; expected a name of a-z, then'),
    (lambda d, t: d["codecs"]["v1"].update(stages=[]), "codecs.v1.stages is []; expected a length of at least 1"),
    (lambda d, t: d["codecs"]["v1"]["stages"][0].update(groups=[group(d)] * 4), "expected a length of at most 3, not 4"),
    (lambda d, t: group(d).update(dims=[[4, 5, 7, 6]]), "names channel 7 where 6 is due; version 1 covers the permuted channe"),
    (lambda d, t: group(d).update(dims=[[4, 5], [6, 7]]), "dims holds 2 subspaces of [2] channels; expected M = 1 of equal si"),
    (lambda d, t: d["codecs"]["v2"]["stages"][1]["groups"][0].update(M=3, dims=[[0, 1], [2, 3], [4, 5]]), "cover [6, 8] chann"),
    # laws between fields
    (lambda d, t: d["layers"].pop(), "layers holds 2 layers; expected 3, as geometry has"),
    (lambda d, t: d["relative_error"].append(None), "relative_error holds 4 layers; expected 3"),
    (lambda d, t: d["layers"][0]["keys"].update(store=["k9"]), 'layers[0].keys.store names the unknown codec "k9" (did you m'),
    (lambda d, t: d["layers"][0]["keys"].update(store=["k2", "v2"]), '.store is ["k2", "v2"]; expected a length of at most 1'),
    (lambda d, t: d["layers"][0]["values"].update(store=["k2"]), "layers[0].values uses codec k2 with key_space pre_rope"),
    (lambda d, t: d["layers"][0]["keys"].update(store=["v2"]), "layers[0].keys uses codec v2 with key_space null"),
    (lambda d, t: d["layers"][0].update(dense="no"), "layers[0] has the unknown field"),
    (lambda d, t: d.update(layers=[{"dense": "no"}] * 3, relative_error=[None] * 3), "layers are all dense; expected at least"),
    (lambda d, t: d["layers"].__setitem__(0, {"dense": "no"}), "relative_error[0] is given; expected null"),
    (lambda d, t: d["relative_error"].__setitem__(0, None), "relative_error[0] is null; expected a number per head"),
    (lambda d, t: d["relative_error"][0].update(keys=[0.5]), "relative_error[0].keys holds 1 numbers; expected one per key/va"),
    (lambda d, t: d["geometry"][0].update(head_dim=16), "layers[0].keys uses codec k2, which covers 8 channels; expected head"),
    (lambda d, t: d["geometry"][0].update(num_heads=3), "geometry[0]: 3 heads; expected a multiple of its 2 key/value heads"),
    (lambda d, t: d["geometry"][0].update(rotary=None), "key_space pre_rope, but the layer has no rotary embedding"),
    (lambda d, t: d["geometry"][0]["rotary"].update(rotary_dim=10), "geometry[0]: rotary_dim is 10; expected at most head_dim"),
    (lambda d, t: d["geometry"][0].update(dense_reason="x"), 'layers[0] has codecs; expected dense, its geometry says "x"'),
    (lambda d, t: d["geometry"][0].update(num_kv_heads=1), "expected one per key/value head, 1"),
    # tensors
    (lambda d, t: t.pop(BOOK), f"tensor {BOOK} is missing; expected F16 [2, 4, 4, 2]"),
    (lambda d, t: t.update(extra=torch.zeros(1)), "tensor 'extra' is surplus"),
    (lambda d, t: rename(t, BOOK, "layers.0.keys.k9.codebooks.0.0"), "is missing"),
    (lambda d, t: t.update({BOOK: t[BOOK].float()}), f"tensor {BOOK} has the wrong type or shape: F32 [2, 4, 4, 2]; expected"),
    (lambda d, t: t.update({BOOK: t[BOOK].bfloat16()}), "the wrong type or shape: BF16"),
    (lambda d, t: t.update({BOOK: t[BOOK][:1].clone()}), "the wrong type or shape: F16 [1, 4, 4, 2]; expected F16 [2, 4, 4, 2"),
    (lambda d, t: t.update({BOOK: t[BOOK].reshape(2, 4, 2, 4)}), "the wrong type or shape: F16 [2, 4, 2, 4]"),
    (poke(BOOK, (0, 0, 0, 0), float("nan")), f"tensor {BOOK} holds a value that is not finite"),
    (poke("layers.0.values.v2.map", (1, 0, 0), float("inf")), "tensor layers.0.values.v2.map holds a value that is not finite"),
    (poke("layers.0.keys.k2.permutation", (1, 0), 99), "permutation is not a permutation of 0..7 for the heads [1]"),
    (poke("layers.0.keys.k2.permutation", (1, 0), -1), "permutation is not a permutation of 0..7 for the heads [1]"),
    (lambda d, t: t["layers.0.keys.k2.map"].zero_(), "layers.0.keys.k2.map is zero, or too near to it"),
    (poke("layers.0.keys.k2.map", (0, 1), 9.0), "layers.0.keys.k2.map differs within a rotary pair"),
    (lambda d, t: t["layers.0.values.v2.map"][1].fill_(1.0), "layers.0.values.v2.map is singular for the heads [1]"),
    (lambda d, t: t["layers.0.values.v2.map"][0, :, 2].zero_(), "layers.0.values.v2.map is singular for the heads [0]"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=[text[:50] for _, text in CHANGES])
def test_a_signed_file_that_breaks_a_law(change: Callable[[Document, Tensors], object], text: str, saved: Path) -> None:
    edit(saved, change)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(saved)
    assert text in str(caught.value)
    assert str(saved) in str(caught.value)


def test_all_faults_are_reported_at_once(saved: Path) -> None:
    def change(document: Document, tensors: Tensors) -> None:
        document["modle"] = document.pop("model")
        group(document)["nbits"] = "8"
        document["cache"]["num_sinks"] = None

    edit(saved, change)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(saved)
    for text in ('"modle"', "lacks the field 'model'", "groups[1].nbits is", "cache.num_sinks is null"):
        assert text in str(caught.value)


def test_endless_faults_are_cut(saved: Path) -> None:
    edit(saved, lambda d, t: d.update(geometry=[0] * 1000))
    with pytest.raises(ArtifactError, match="and 9.. more") as caught:
        open_artifact(saved)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("num_fields", [60_000, 300_000])
def test_very_many_faults_are_refused_at_once(num_fields: int, saved: Path) -> None:
    document, tensors = read_parts(saved)
    del document["model"]
    write_signed(saved, document | {f"{i:x}": 0 for i in range(num_fields)}, tensors)
    started = time.perf_counter()
    with pytest.raises(ArtifactError, match="and 59981 more|has more than 65536 values") as caught:
        open_artifact(saved)
    assert time.perf_counter() - started < 10  # 0.5 s on an idle core
    assert len(str(caught.value)) < 6000


def test_names_in_a_message_are_ascii_and_short(saved: Path) -> None:
    edit(saved, lambda d, t: d["kernels"].update({"\x1b[31m": 0, "n" * 1000: 0}))
    with pytest.raises(ArtifactError) as caught:
        open_artifact(saved)
    assert "kernels.\\u001b[31m is 0; expected an object" in str(caught.value)
    assert "\x1b" not in str(caught.value) and "n" * 100 not in str(caught.value)


def test_a_hash_that_is_none(saved: Path) -> None:
    document, tensors = read_parts(saved)
    for sha256, text in ((7, "sha256 is 7; expected a SHA-256"), ("", "the header says nothing")):
        saved.write_bytes(save(tensors, metadata={"pqkv": canonical_json(document | {"sha256": sha256})}))
        with pytest.raises(ArtifactError, match=text):
            open_artifact(saved)


def test_a_flipped_tensor_bit_breaks_the_hash(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ArtifactError, match="content hash is [0-9a-f]{12}; the header says [0-9a-f]{12}: the file was"):
        open_artifact(saved)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, "the metadata has no key 'pqkv'"),
        ({"format": "pt"}, "the metadata has no key 'pqkv'"),
        ({"pqkv": "{}", "format": "pt"}, "the metadata has keys beside 'pqkv': 'format'"),
        ({"pqkv": "{"}, "the header is not valid JSON"),
        ({"pqkv": '{"x":NaN}'}, "the header is not valid JSON (Out of range float values are not JSON"),
        ({"pqkv": '{"x":1e999}'}, "the header is not valid JSON"),
        ({"pqkv": "[" * 100_000}, "the header is not valid JSON"),
        ({"pqkv": "9" * 10_000}, "the header is not valid JSON"),
        ({"pqkv": "[]"}, "the header is not a JSON object"),
        ({"pqkv": "{}"}, "the format is null; expected"),
        ({"pqkv": '{"format": "pqkv","version":1}'}, "the header is not canonical JSON"),
        ({"pqkv": '{"format":"pqkv","version":1,"version":1}'}, "the header is not canonical JSON"),
        ({"pqkv": '{"format":"pqkv","label":"\u00e9","version":1}'}, "the head is not valid JSON"),
        ({"pqkv": '{"format":"pqkv","version":1}'}, "the header lacks the field 'codecs'"),
    ],
)
def test_metadata(metadata: dict[str, str] | None, text: str, saved: Path) -> None:
    saved.write_bytes(save(read_parts(saved)[1], metadata=metadata))
    with pytest.raises(ArtifactError) as caught:
        open_artifact(saved)
    assert text in str(caught.value)


def container(document: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = document if isinstance(document, bytes) else json.dumps(document, separators=(",", ":")).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


META = {"__metadata__": {"pqkv": "{}"}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file holds 0 bytes"),
        (b"\x00" * 8, "promises a head of 0 bytes"),
        (b"not a safetensors file at all", "it is not a safetensors file or was cut off"),
        (container({}, length=2**63), "promises a head of 9223372036854775808 bytes"),
        (container(b"{" + b" " * (1 << 22) + b"}"), "expected at most 4194304"),
        (container(b"\xff\xfe"), "the head is not valid JSON"),
        (container([]), "the head is not a compact JSON object"),
        (container(b'{ "__metadata__":{"pqkv":"{}"}}'), "the head is not a compact JSON object"),
        (container(b'{"__metadata__":{"pqkv":"{}"}}\t'), "the head is not a compact JSON object"),
        (container({"__metadata__": {"pqkv": 1}}), "is not a string"),
        (container({"__metadata__": []}), "the metadata has no key 'pqkv'"),
        (container(META | {"a": 1}), "tensor 'a' is not described by dtype, shape and data_offsets"),
        (container(META | {"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}, b"00"), "is not described by"),
        (container(META | {"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}, b"0000"), "expected a start at 0"),
        (container(META | {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2**62]}}, b"00"), "its head promises 46116"),
        (container(META, b"surplus"), "the file holds 7 tensor bytes and its head promises 0"),
    ],
)
def test_containers(content: bytes, text: str, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(saved)
    assert text in str(caught.value)


def test_bytes_that_do_not_fit_the_shape(saved: Path) -> None:
    raw = saved.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    last = max((name for name in head if name != "__metadata__"), key=lambda name: head[name]["data_offsets"][1])
    head[last]["data_offsets"][1] += 2
    saved.write_bytes(container(head, raw[8 + length :] + b"00"))
    with pytest.raises(ArtifactError, match=r"permutation holds 34 bytes; expected 32"):
        open_artifact(saved)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing does not exist; make it with: pqkv export"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"pqkv.safetensors does not exist"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact("nul\0byte")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(tmp_path / "file" / "below")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_artifact(tmp_path / "pipe")
