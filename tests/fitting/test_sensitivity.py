"""Fits weighted by what gradients say an error costs."""

from dataclasses import replace

import fitting_support as support
import pytest
import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError
from pqkv_cli.fitting.fit import fit_layer
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.reference.encode import round_trip

FISHER = FitSettings(iterations=6, key_weighting="fisher", value_weighting="fisher")


def measured(seed: int, costly: slice) -> LayerSamples:
    """Return samples of which the `costly` ones of keys, and all but those of values, cost a hundred times the others."""
    samples = support.samples(seed)
    weight = torch.full((support.HEADS, support.POINTS), 0.01)
    weight[:, costly] = 1.0
    return replace(samples, key_weight=weight, value_weight=1.01 - weight)


def errors(samples: LayerSamples, settings: FitSettings, side: Side, part: slice) -> float:
    tables = fit_layer(samples, support.LAYER, support.SPECS, settings=settings).tables[side]
    vectors = (samples.keys if side == "keys" else samples.values).float()
    return float((round_trip(vectors[None], tables, rotated=False)[0] - vectors)[:, part].square().mean())


@pytest.mark.parametrize("side", SIDES)
def test_vectors_whose_errors_cost_more_are_coded_better(side: Side) -> None:
    samples, costly = measured(0, slice(0, 100)), slice(0, 100) if side == "keys" else slice(100, None)
    by_attention = replace(FISHER, key_weighting="sqrt", value_weighting="sqrt")
    assert errors(samples, FISHER, side, costly) < 0.95 * errors(samples, by_attention, side, costly)


def test_a_calibration_without_gradients_is_refused() -> None:
    with pytest.raises(DataError, match=r"layer 3, keys: the calibration holds no gradients.*calibrate with --fisher"):
        fit_layer(support.samples(0), support.LAYER, support.SPECS, index=3, settings=FISHER)


def test_gradients_that_are_not_asked_for_change_nothing() -> None:
    plain = FitSettings(iterations=6)
    first, second = (
        fit_layer(samples, support.LAYER, support.SPECS, settings=plain)
        for samples in (support.samples(1), measured(1, slice(0, 9)))
    )
    for side in SIDES:
        assert torch.equal(first.tables[side].codebooks[0][0], second.tables[side].codebooks[0][0])
