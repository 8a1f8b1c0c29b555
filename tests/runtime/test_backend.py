from typing import Any

import pytest
import torch
from tiny_chain import tokens

from pqkv_cli.errors import CacheError
from pqkv_cli.runtime import Artifact, attach
from pqkv_kernels.cpu.build import find_compiler
from pqkv_kernels.gpu import backend as gpu_backend


def test_attach_says_what_attends_and_why(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        on_cpu = "native" if find_compiler() else "torch"
        expected = "triton" if torch.cuda.is_available() else on_cpu
        assert attached.backend.name == expected and attached.backend.reason
        assert {layer.backend for layer in attached.new_cache().quantized_layers} == {expected}
    with attach(model, artifact, backend="torch") as attached:
        assert attached.backend.reason == "asked for by name"


def test_a_backend_that_cannot_run_is_an_error(model: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "find_spec", lambda name: None)
    with pytest.raises(CacheError, match="the triton backend was asked for, but Triton is not installed"):
        attach(model, artifact, backend="triton")
    assert model.config._attn_implementation != "pqkv"
    with pytest.raises(CacheError, match="backend is 'fast'; expected one of auto, torch, native, triton"):
        attach(model, artifact, backend="fast")


@torch.no_grad()
def test_positions_with_gaps_inside_a_page_are_decoded_right(model: Any, artifact: Artifact) -> None:
    """Angles of whole pages would be wrong there: each token's own position must count."""
    ids = tokens(1, 131)
    positions = torch.arange(131) + 40 * (torch.arange(131) > 30)
    logits = []
    with attach(model, artifact) as attached:
        for name in ("pqkv", "sdpa"):  # sdpa reads what the codes decode to
            model.set_attn_implementation(name)
            cache = attached.new_cache()
            model(ids[:, :130], position_ids=positions[None, :130], past_key_values=cache)
            logits.append(model(ids[:, 130:], position_ids=positions[None, 130:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
