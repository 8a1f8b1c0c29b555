"""Every family: calibrate, fit, save, attach; then attention over codes against a dense cache of the decoded values."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES
from tiny_chain import tokens

from pqkv_cli.models.families import family
from pqkv_cli.models.geometry import geometry
from pqkv_cli.runtime import Attached, attach

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from oracle import oracle_cache

STEPS = (150, *[1] * 6, 40, *[1] * 3)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: Any, family_case: Callable[[str], Any]) -> Any:
    return family_case(request.param)


def oracle(attached: Attached) -> Any:
    # The model's own plain attention; that of doge in transformers 5.17 misreads the masks of the eager one.
    attached.model.set_attn_implementation("sdpa" if attached.model.config.model_type == "doge" else "eager")
    return oracle_cache(attached.model.config, attached._tables, attached.spec, attached._angles)


@torch.no_grad()
def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    pieces = ids.split(STEPS, dim=1)
    return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)


# Texts of which no vector lies halfway between two centroids, where rounding may choose either.
SEEDS = {"gemma2": 4, "gemma4_text": 1}


def test_logits_are_those_of_the_decoded_values(case: Any) -> None:
    model, artifact = case
    ids = tokens(2, sum(STEPS), seed=SEEDS.get(model.config.model_type, 0))
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        found = logits(model, cache, ids)
        expected = logits(model, oracle(attached), ids)
        with torch.no_grad():  # under the same attention, so that only compression differs
            exact = model(ids, use_cache=False).logits
    loss = (expected - exact).abs().max()
    assert loss > 0, "a codec that loses nothing tests nothing"
    assert (found - expected).abs().max() < 1e-3 * loss
    full = [not layer.dense_reason for layer in geometry(model.config).layers]
    assert len(cache.quantized_layers) == sum(full) > 0
    assert cache.num_bytes().codes > 0 and cache.num_bytes().dense >= 0
    reads_codes = family(model.config.model_type).tier == "codes"
    assert (cache.num_materialized == 0) is reads_codes, "the declared tier must be what happens"
