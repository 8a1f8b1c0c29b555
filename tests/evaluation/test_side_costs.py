"""Costs of errors from gradients, against the divergence that the same errors cause, one token and head at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.evaluation.text_windows import diverge
from pqkv_cli.fitting.gradient_costs import LayerSide, gradient_costs
from pqkv_cli.quantizers.codec import ProductCodec
from pqkv_cli.runtime import load
from pqkv_cli.runtime.attach import simulate
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.tables import CodecTables

SHARE = 0.03  # of an error: small enough that its cost grows with its square
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[LayerSide, CodecTables]:
    artifact = load(fit_artifact(tiny_llama(), Path(tmp_path_factory.mktemp("tiny")), 1))
    return {(i, side): found[side] for i, found in enumerate(artifact.tables) if found is not None for side in SIDES}


class ExactCodec:
    """Changes nothing: stands in for a side that is left alone while the other one is measured."""

    rotary, bits_per_channel = None, 32.0

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class OneTokenOfOneHead:
    """Moves the vector of one token of one head a share of the way to what its codec makes of it."""

    bits_per_channel = 0.0

    def __init__(self, codec: ProductCodec, head: int, token: int) -> None:
        self.rotary, self._codec, self._head, self._token = codec.rotary, codec, head, token

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        moved, decoded = x.clone(), self._codec.encode_decode(x.float())
        moved[:, self._head, self._token] += SHARE * (decoded - x)[:, self._head, self._token].to(x.dtype)
        return moved


def alone(model: Any, window: torch.Tensor, place: LayerSide, codec: Any) -> float:
    """Return the sum over tokens of the divergence, in bits, that one moved vector causes."""
    index, side = place
    codecs: list[Any] = [None, None]
    codecs[index] = {other: ExactCodec() for other in SIDES} | {side: codec}
    with torch.no_grad(), simulate(model, codecs) as simulation:
        moved = model(window, past_key_values=simulation.new_cache()).logits[0].double().log_softmax(-1)
        baseline = model(window).logits[0].double().log_softmax(-1)
    return float((baseline.exp() * (baseline - moved)).sum()) / torch.tensor(2.0).log().item()


@pytest.mark.parametrize("place", [(0, "keys"), (1, "keys"), (0, "values"), (1, "values")])
def test_costs_are_those_of_one_vector_after_another(tables: dict[LayerSide, CodecTables], place: LayerSide) -> None:
    model, window = tiny_llama(), tokens(1, NUM_TOKENS, seed=7)
    costs = gradient_costs(model, window, tables, lambda *_: None, draws=400)
    codec = ProductCodec(tables[place])
    exact = tiny_llama().double()  # differences this small drown in fp32
    total = sum(
        alone(exact, window, place, OneTokenOfOneHead(codec, head, token)) for head in range(2) for token in range(NUM_TOKENS)
    )
    assert costs[place] == pytest.approx(total / SHARE**2 / NUM_TOKENS, rel=0.15)


def divergence(model: Any, windows: torch.Tensor, place: LayerSide, tables: CodecTables) -> float:
    """Return the mean KL divergence, in bits per predicted token, with one side of one layer quantized alone."""
    index, side = place
    codecs: list[Any] = [None, None]
    codecs[index] = {other: ExactCodec() for other in SIDES} | {side: ProductCodec(tables)}
    losses = []
    for window in windows:
        with torch.no_grad(), simulate(model, codecs) as simulation:
            quantized = model(window[None], past_key_values=simulation.new_cache()).logits[0, :-1]
            baseline = model(window[None], use_cache=False).logits[0, :-1]
        losses.append(diverge(baseline, quantized, window[1:]).kl_bits.mean())
    return float(torch.stack(losses).mean())


def test_costs_tell_what_divergence_tells(tables: dict[LayerSide, CodecTables]) -> None:
    model, windows = tiny_llama(), tokens(4, 64, seed=8)
    costs = gradient_costs(model, windows, tables, lambda *_: None, draws=4)
    measured = {place: divergence(model, windows, place, found) for place, found in tables.items()}
    told = {place: loss for place, loss in measured.items() if loss > 1e-5}
    assert len(told) == 2  # the first layer has as many vectors as there are tokens, and is coded without any error
    for place, loss in told.items():
        assert 1 / 3 < costs[place] / loss < 3, (place, costs[place], loss)


def test_it_counts_windows_and_leaves_the_model_as_it_was(tables: dict[LayerSide, CodecTables]) -> None:
    model, seen = tiny_llama(), []
    asking = [parameter.requires_grad for parameter in model.parameters()]
    gradient_costs(model, tokens(2, 20), tables, lambda *n: seen.append(n))
    assert seen == [(1, 2), (2, 2)]
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
