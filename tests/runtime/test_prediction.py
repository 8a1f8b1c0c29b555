"""Caches whose values are predicted from keys: every way to generate, decoding, cutting, storing, checking."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_paths import PATHS
from prefix_support import filled, goes_on, read
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.artifact.exercise import exercise_codecs
from pqkv_cli.errors import ArtifactError, CacheError
from pqkv_cli.rates import CodeStyle
from pqkv_cli.runtime import Artifact, Attached, PrefixStore, attach, load
from pqkv_cli.runtime.attach import simulate_artifact
from pqkv_cli.specs import CacheSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from oracle import generate, oracle_of

STYLE = CodeStyle(predict_values=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load(fit_artifact(tiny_llama(), tmp_path_factory.mktemp("predicted"), style=STYLE))


@pytest.fixture
def attached(artifact: Artifact) -> Iterator[Attached]:
    with attach(tiny_llama(), artifact) as made:
        yield made


def test_the_artifact_says_so(artifact: Artifact) -> None:
    plan = artifact.header.plan
    assert [plan.codecs[name].predicted for name in ("k4", "v4")] == [False, True]
    for layer in artifact.tables:
        assert layer is not None and layer["values"].prediction is not None and layer["keys"].prediction is None


@pytest.mark.parametrize("path", [path for path in PATHS if path != "assistant"])
def test_every_way_to_generate(path: str, attached: Attached) -> None:
    options = dict(PATHS[path])
    ids = tokens(options.pop("rows", 1), 200, seed=2)
    mask = torch.ones_like(ids)
    if options.pop("padded", False):
        mask[0, :70] = 0
    options.setdefault("attention_mask", mask)
    cache = attached.new_cache()
    found = generate(attached, cache, ids, **options)
    assert torch.equal(found, generate(attached, oracle_of(attached), ids, **options))
    assert cache.num_materialized == 0


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_backends_agree(backend: Any, artifact: Artifact) -> None:
    ids, steps = tokens(2, 300, seed=3), (200, 1, 30, 1, 68)
    logits = []
    for name in ("torch", backend):
        with attach(tiny_llama(), artifact, backend=name) as made:
            logits.append(read(made, made.new_cache(), ids, steps))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_attention_that_decodes_gives_the_same(attached: Attached) -> None:
    ids = tokens(1, 260, seed=4)
    expected = read(attached, attached.new_cache(), ids, (200, 60))
    attached.model.set_attn_implementation("eager")
    found = read(attached, attached.new_cache(), ids, (200, 60))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_prefixes_are_restored_bit_for_bit(attached: Attached, tmp_path: Path) -> None:
    ids = tokens(1, 240, seed=6)
    live, store = filled(attached, ids[:, :190]), PrefixStore(tmp_path)
    store.save(attached, live, ids[:, :190])
    restored = store.longest_prefix(attached, ids).cache
    assert torch.equal(goes_on(attached, restored, ids), goes_on(attached, live, ids))


def test_mode_all_decodes_what_the_cache_decodes(artifact: Artifact) -> None:
    model, generator = tiny_llama(), torch.Generator().manual_seed(7)
    states = [torch.randn(1, 2, 128, 16, generator=generator) for _ in range(2)]
    decoded = []
    with attach(model, artifact, cache=CacheSpec(0, 0)) as made:
        for cache in (made.new_cache(), simulate_artifact(model, artifact).new_cache()):
            cache.slots.begin(0, torch.arange(128)[None], None)
            cache.layers[0].update(*states)
            cache.slots.begin(128, torch.tensor([[128]]), None)
            new = [torch.zeros(1, 2, 1, 16) for _ in range(2)]
            decoded.append([held.clone()[:, :, :128] for held in cache.layers[0].update(*new)])
    for one, other in zip(*decoded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_verify_finds_the_codecs_sound(artifact: Artifact) -> None:
    assert not [fault for test in exercise_codecs(artifact) for fault in test.faults]


def test_the_self_test_finds_a_wrong_prediction(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqkv_kernels.cpu import attention, torch_attention

    for module in (attention, torch_attention):
        right = module.plane_prediction
        monkeypatch.setattr(module, "plane_prediction", lambda keys, values, right=right: right(keys, values) * 1.05)
    with pytest.raises(CacheError, match="attention over codes differs"):
        attach(tiny_llama(), artifact)


def test_a_header_that_predicts_keys_is_refused(artifact: Artifact) -> None:
    from pqkv_cli.artifact.header import header_document, parse_header

    document = header_document(artifact.header)
    document["codecs"]["k4"]["predicted"] = True
    with pytest.raises(ArtifactError, match="expected only values to be predicted"):
        parse_header(document)
    assert "predicted" not in header_document(replace(artifact.header))["codecs"]["k4"]
