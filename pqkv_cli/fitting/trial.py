"""What each rate would leave over of a layer's keys and values, from a short fit. Knows samples, formats and its own files."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import RunError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.fit import FittedLayer, checked_side
from pqkv_cli.fitting.layer_file import load_layer, save_layer
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.side import SideFit
from pqkv_cli.fitting.split import num_fitted
from pqkv_cli.specs import SIDES, CodecSpec, LayerGeometry, Side
from pqkv_kernels.tables import CodecTables

# A trial tells rates apart; it takes a part of the vectors and of the rounds that a fit takes.
TRIAL_VECTORS = 8192
TRIAL_SHARE = 2
SCHEMA = "pqkv.trial/2"
# Costs are measured where errors are at least this share of the largest: what hardly any error costs says nothing of more.
LEAST_ERROR = 1 / 32


@dataclass(frozen=True, slots=True)
class Trial:
    """A layer tried at several rates.

    Attributes
    ----------
    errors
        By side and rate: the relative error in code space, mean over KV heads, on vectors not fitted.
    base
        By side: the rate at which its cost is measured.
    tables
        The codec of each side at that rate.
    """

    errors: Mapping[Side, Mapping[float, float]]
    base: Mapping[Side, float]
    tables: Mapping[Side, CodecTables]


def try_layer(
    samples: LayerSamples,
    layer: LayerGeometry,
    specs: Mapping[Side, Mapping[float, CodecSpec]],
    bits: float,
    *,
    index: int,
    settings: FitSettings,
) -> Trial:
    """Fit a layer shortly at every rate of `specs`; keep the codecs at the `base_rate` for `bits`.

    Raises
    ------
    DataError
        If samples are degenerate or fewer than centroids.
    """
    short = shortened(settings)
    errors: dict[Side, dict[float, float]] = {}
    tables: dict[Side, CodecTables] = {}
    base: dict[Side, float] = {}
    for side in SIDES:
        first, errors[side] = next(iter(specs[side].values())), {}
        with checked_side(samples, index, side):
            fit, fitted = SideFit(samples, layer, first, side, index, short), {}
            for rate, spec in specs[side].items():
                fitted[rate], error = fit.fit(spec.layout, short.iterations, TRIAL_VECTORS)
                errors[side][rate] = float(error.mean())
        base[side] = base_rate(errors[side], bits)
        tables[side] = fitted[base[side]]
    return Trial(errors, base, tables)


def shortened(settings: FitSettings) -> FitSettings:
    """Return `settings` with as few rounds as a trial takes."""
    return replace(settings, iterations=max(1, settings.iterations // TRIAL_SHARE))


def base_rate(errors: Mapping[float, float], bits: float) -> float:
    """Return the rate nearest to `bits` of those that leave errors which can be told from none, the lower of two."""
    told = [rate for rate, error in errors.items() if error >= LEAST_ERROR * max(errors.values())]
    return min(told, key=lambda rate: (abs(rate - bits), rate))


def num_trial_vectors(positions: torch.Tensor) -> int:
    """Return how many of the samples at `positions` [N] the codebooks of a trial are fitted to."""
    return num_fitted(positions, TRIAL_VECTORS)


def save_trial(directory: Path, index: int, trial: Trial, request_sha256: str) -> None:
    """Write a layer's trial; the small JSON file is the commit point.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    mean = {side: tuple(errors.values()) for side, errors in trial.errors.items()}
    save_layer(_tables_path(directory, index), FittedLayer(trial.tables, mean), request_sha256)
    errors = {side: [[bits, error] for bits, error in rates.items()] for side, rates in trial.errors.items()}
    document = {"schema": SCHEMA, "request_sha256": request_sha256, "errors": errors, "base": dict(trial.base)}
    write_text(_errors_path(directory, index), json.dumps(document, sort_keys=True) + "\n", RunError)


def load_trial(
    directory: Path, index: int, specs: Mapping[Side, Mapping[float, CodecSpec]], request_sha256: str
) -> Trial | None:
    """Return the trial that answers this request, None where there is none or it is damaged; `specs` as for `try_layer`."""
    with contextlib.suppress(RunError, OSError, ValueError, KeyError, TypeError):
        document = json.loads(_errors_path(directory, index).read_text(encoding="utf-8"))
        base: dict[Side, float] = {side: document["base"][side] for side in SIDES}
        fitted, stamp = load_layer(_tables_path(directory, index), {side: specs[side][base[side]] for side in SIDES})
        if document["schema"] == SCHEMA and document["request_sha256"] == stamp.request_sha256 == request_sha256:
            errors: dict[Side, dict[float, float]] = {
                side: {rate: error for rate, error in document["errors"][side]} for side in SIDES
            }
            return Trial(errors, base, fitted.tables)
    return None


def _tables_path(directory: Path, index: int) -> Path:
    return directory / f"trial_{index:03d}.safetensors"


def _errors_path(directory: Path, index: int) -> Path:
    return directory / f"trial_{index:03d}.json"
