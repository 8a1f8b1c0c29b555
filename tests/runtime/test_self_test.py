from typing import Any

import pytest
import torch
from tests_support import random_codebooks

from pqkv_cli.errors import CacheError
from pqkv_cli.runtime import Artifact, attach, attention, self_test
from pqkv_cli.runtime.self_test import self_test as run_self_test
from pqkv_kernels.cpu.build import find_compiler
from pqkv_kernels.dispatch import BackendName
from pqkv_kernels.format.layout import CodeGroup, CodeLayout
from pqkv_kernels.format.tables import CodecTables


def probe(artifact: Artifact, model: Any) -> None:
    with attach(model, artifact) as attached:
        run_self_test(artifact.tables, attached._angles, torch.device("cpu"))


def test_a_right_machine_passes(model: Any, artifact: Artifact) -> None:
    probe(artifact, model)


def test_every_format_is_probed(model: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []
    monkeypatch.setattr(self_test, "_test_layer", lambda tables, *rest: probed.append(tables))
    attach(model, artifact).detach()
    assert len(probed) == 1, "both layers have the same format"


@pytest.mark.parametrize("wrong", ["coded", "exact", "nan"])
def test_wrong_attention_is_found_and_nothing_stays_attached(
    model: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    name = "attend_codes" if wrong == "coded" else "attend_exact"
    right = getattr(attention, name)
    factor = {"coded": 1.1, "exact": 10.0, "nan": float("nan")}[wrong]

    def spoilt(*args: Any) -> Any:
        out, lse = right(*args)
        return out * factor, lse

    monkeypatch.setattr(attention, name, spoilt)
    with pytest.raises(CacheError, match="self-test: attention over codes differs from the reference by"):
        attach(model, artifact)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    attach(model, artifact).detach()


def test_wrong_encoding_is_found(model: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqkv_cli.cache import encoder

    right = encoder.encode_pages
    monkeypatch.setattr(encoder, "encode_pages", lambda *args: right(*args).flip(-1))
    with pytest.raises(CacheError, match="self-test"):
        attach(model, artifact)


FORMATS = {
    "one stage": CodeLayout(((CodeGroup(16, 8, 2),),)),
    "prototypes and parts": CodeLayout(((CodeGroup(1, 10, 32),), (CodeGroup(16, 8, 2),))),
    "stages searched together": CodeLayout(((CodeGroup(16, 4, 2),), (CodeGroup(16, 4, 2),))),
    "stages searched one by one": CodeLayout(((CodeGroup(8, 8, 4),), (CodeGroup(8, 8, 4),))),
}


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_wrong_code_in_a_thousand_is_found(
    name: str, backend: BackendName, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pqkv_cli.cache import encoder

    if backend == "native" and find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    keys, values = (CodecTables(FORMATS[name], random_codebooks(FORMATS[name], 2, generator)) for _ in range(2))
    tables = [{"keys": keys, "values": values}]
    run_self_test(tables, [None], torch.device("cpu"), backend)
    right = encoder.encode_pages

    def spoilt(chosen: BackendName, x: torch.Tensor, codec: CodecTables, *rest: Any) -> torch.Tensor:
        """Change the lowest bit of one code in a thousand, each of another vector."""
        pages = right(chosen, x, codec, *rest).clone()
        layout = codec.layout
        every = [place for place in layout.spans() for _ in range(place[2].num_subspaces)]
        for wrong in range(max(1, 2 * 64 * len(every) // 1000)):
            _, _, group, offset, _ = every[(7 * wrong) % len(every)]
            width = 8 if group.nbits >= 8 else group.nbits  # the first part of a code
            token = 11 * wrong % 64
            pages[0, 0, wrong % 2, offset + token * width // 8] ^= 1 << (token * width % 8)
        return pages

    monkeypatch.setattr(encoder, "encode_pages", spoilt)
    with pytest.raises(CacheError, match="self-test: encoding of keys gives .* vectors other codes than the reference"):
        run_self_test(tables, [None], torch.device("cpu"), backend)
