"""The uncompressed model does not change when all positions move, so the compressed one must not either."""

from typing import Any

import pytest
import torch
from tiny_chain import tokens

from pqkv_cli.evaluation.text_windows import diverge
from pqkv_cli.runtime import Artifact, attach, simulate_artifact

NUM_TOKENS, CHUNK = 320, 32
OFFSETS = (0, 4096, 32768, 131072)


def compressed(model: Any, cache: Any, ids: torch.Tensor, offset: int, chunk: int) -> torch.Tensor:
    positions = torch.arange(NUM_TOKENS)[None] + offset
    parts = [
        model(ids[:, i : i + chunk], position_ids=positions[:, i : i + chunk], past_key_values=cache, use_cache=True).logits[0]
        for i in range(0, NUM_TOKENS, chunk)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("mode", ["all", "cache"])
@torch.no_grad()
def test_divergence_does_not_depend_on_the_offset(mode: str, model: Any, artifact: Artifact) -> None:
    ids = tokens(1, NUM_TOKENS, seed=5)
    found, kl = [], []
    for offset in OFFSETS:
        exact = model(ids, position_ids=torch.arange(NUM_TOKENS)[None] + offset, use_cache=False).logits[0]
        with simulate_artifact(model, artifact) if mode == "all" else attach(model, artifact) as prepared:
            logits = compressed(model, prepared.new_cache(), ids, offset, NUM_TOKENS if mode == "all" else CHUNK)
        found.append(logits)
        kl.append(float(diverge(exact, logits, ids[0]).kl_bits.mean()))
    assert kl[0] > 1e-4, "a codec that loses nothing tests nothing"
    assert kl == pytest.approx([kl[0]] * len(OFFSETS), rel=0.03)
    for logits in found[1:]:
        error = (logits - found[0]).square().mean().sqrt() / found[0].std()
        assert float(error) < 0.01


@torch.no_grad()
def test_codes_do_not_depend_on_the_offset(model: Any, artifact: Artifact) -> None:
    ids, pages = tokens(1, NUM_TOKENS, seed=5), []
    with attach(model, artifact) as attached:
        for offset in OFFSETS:
            cache = attached.new_cache()
            compressed(model, cache, ids, offset, NUM_TOKENS)
            pages.append(torch.cat([view.flatten() for view in cache.quantized_layers[0].pages["keys"].views()]))
    for moved in pages[1:]:
        assert float((moved == pages[0]).float().mean()) > 0.99  # ties alone may fall otherwise
