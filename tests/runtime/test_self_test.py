from typing import Any

import pytest
import torch

from pqkv_cli.errors import CacheError
from pqkv_cli.runtime import Artifact, attach, attention, self_test
from pqkv_cli.runtime.self_test import self_test as run_self_test


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
