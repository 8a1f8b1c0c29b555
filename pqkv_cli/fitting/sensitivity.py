"""Samples in the terms of gradients instead of queries, attention and weights. Knows calibration samples; fits nothing."""

from dataclasses import replace

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError
from pqkv_cli.specs import Side


def as_gradients_see(samples: LayerSamples, side: Side) -> LayerSamples:
    """Return `samples` with the cost of an error of `side`, as gradients measured it, in the place of the attention mass.

    Raises
    ------
    DataError
        If calibration measured no gradients.
    """
    weight = samples.key_weight if side == "keys" else samples.value_weight
    if weight is None:
        raise DataError("the calibration holds no gradients; expected them for the weighting 'fisher'; calibrate with --fisher")
    return replace(samples, attention_mass=weight)
