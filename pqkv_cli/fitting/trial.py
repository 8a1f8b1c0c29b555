"""What each rate would leave over of a layer's keys and values, from short fits. Knows samples, formats and its own files."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import RunError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.fit import FittedLayer, SideFit, checked_side, num_fitted
from pqkv_cli.fitting.layer_file import load_layer, save_layer
from pqkv_cli.fitting.record import codec_facts, digest, read_document
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.specs import SIDES, CodecSpec, LayerGeometry, Side
from pqkv_kernels.format.tables import CodecTables

# A trial tells rates apart; it takes a part of the vectors and of the rounds that a fit takes.
TRIAL_VECTORS = 8192
TRIAL_SHARE = 2
SCHEMA = "pqkv.trial/3"
# Costs are measured where errors are at least this share of the largest: what hardly any error costs says nothing of more.
LEAST_ERROR = 1 / 32

Menu = Mapping[float, CodecSpec]


@dataclass(frozen=True, slots=True)
class Trial:
    """A layer tried at several rates.

    Attributes
    ----------
    errors
        By side and digest of a codec's spec: the relative error in code space, mean over KV heads, on vectors not fitted; of
        predicted values with that of the keys that they were predicted from. Those of other budgets stay, so that a budget fits
        only what none before it has tried.
    tables
        By side: the spec and the tables of the codec whose cost is measured.
    """

    errors: Mapping[Side, Mapping[str, float]]
    tables: Mapping[Side, tuple[CodecSpec, CodecTables]]

    def error(self, side: Side, spec: CodecSpec) -> float:
        """Return the relative error of a codec that was tried."""
        return self.errors[side][_name(spec, self._keys)]

    @property
    def _keys(self) -> CodecSpec | None:
        """What values are predicted from, once it is known."""
        return self.tables["keys"][0] if "keys" in self.tables else None

    def answers(self, menus: Mapping[Side, Menu], bits: float) -> bool:
        """Return whether all of `menus` was tried, and the tables are those at the `base_rate` for `bits`."""
        return all(
            side in self.tables
            and self.errors[side].keys() >= {_name(spec, self._keys) for spec in menu.values()}
            and self.tables[side][0] == base_spec(menu, self.errors[side], bits, self._keys)
            for side, menu in menus.items()
        )


NOTHING_TRIED = Trial({side: {} for side in SIDES}, {})


def try_layer(
    samples: LayerSamples,
    layer: LayerGeometry,
    menus: Mapping[Side, Menu],
    bits: float,
    *,
    index: int,
    settings: FitSettings,
    known: Trial = NOTHING_TRIED,
) -> Trial:
    """Fit a layer shortly at every rate of `menus` that `known` has not; keep the codecs at the `base_rate` for `bits`.

    What a rate gives depends on no other rate of its side: the answer is the same however much of it was known. Predicted
    values are tried with the keys at their base rate.

    Raises
    ------
    DataError
        If samples are degenerate or fewer than centroids.
    """
    short = shortened(settings)
    errors: dict[Side, Mapping[str, float]] = {}
    tables: dict[Side, tuple[CodecSpec, CodecTables]] = {}
    for side, menu in menus.items():
        fitted = _known_tables(known, side, tables)
        with checked_side(samples, index, side):
            keys, key_tables = tables.get("keys", (None, None))
            fit = SideFit(samples, layer, next(iter(menu.values())), side, index, short, key_tables)
            side_errors = dict(known.errors[side])
            for spec in (s for s in menu.values() if _name(s, keys) not in side_errors):
                fitted[spec], error = fit.fit(spec.layout, short.iterations, TRIAL_VECTORS)
                side_errors[_name(spec, keys)] = float(error.mean())
            base = base_spec(menu, side_errors, bits, keys)
            if base not in fitted:
                fitted[base], _ = fit.fit(base.layout, short.iterations, TRIAL_VECTORS)
        errors[side], tables[side] = side_errors, (base, fitted[base])
    return Trial(errors, tables)


def _known_tables(known: Trial, side: Side, made: Mapping[Side, tuple[CodecSpec, CodecTables]]) -> dict[CodecSpec, CodecTables]:
    """Return the tables that an earlier trial left; those of predicted values only if the keys are the same."""
    if side not in known.tables:
        return {}
    spec, tables = known.tables[side]
    return {} if spec.predicted and known.tables.get("keys", ())[:1] != made["keys"][:1] else {spec: tables}


def base_spec(menu: Menu, errors: Mapping[str, float], bits: float, keys: CodecSpec | None = None) -> CodecSpec:
    """Return the codec of `menu` at the `base_rate` for `bits`, from errors by digest; `keys` as `Trial.errors` tells."""
    return menu[base_rate({rate: errors[_name(spec, keys)] for rate, spec in menu.items()}, bits)]


def shortened(settings: FitSettings) -> FitSettings:
    """Return `settings` with as few rounds as a trial takes."""
    return replace(settings, iterations=max(1, settings.iterations // TRIAL_SHARE))


def base_rate(errors: Mapping[float, float], bits: float) -> float:
    """Return the rate nearest to `bits` of those whose errors can be told from none, the lower of two."""
    with_error = [rate for rate, error in errors.items() if error >= LEAST_ERROR * max(errors.values())]
    return min(with_error, key=lambda rate: (abs(rate - bits), rate))


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
    error = {side: (trial.error(side, spec),) for side, (spec, _) in trial.tables.items()}
    tables = {side: tables for side, (_, tables) in trial.tables.items()}
    save_layer(_tables_path(directory, index), FittedLayer(tables, error), request_sha256)
    base = {side: _name(spec) for side, (spec, _) in trial.tables.items()}
    document = {"schema": SCHEMA, "request_sha256": request_sha256, "errors": trial.errors, "base": base}
    write_text(_errors_path(directory, index), json.dumps(document, sort_keys=True) + "\n", RunError)


def load_trial(directory: Path, index: int, menus: Mapping[Side, Menu], request_sha256: str) -> Trial:
    """Return what is known of a layer from trials with this request; tables only of codecs in `menus`.

    A file that is absent, damaged or of another request tells nothing.
    """
    trial = NOTHING_TRIED
    with contextlib.suppress(RunError, AttributeError, ValueError, KeyError, TypeError, StopIteration):
        document = read_document(_errors_path(directory, index), SCHEMA, "")
        if document is not None and document["request_sha256"] == request_sha256:
            trial = Trial({side: {name: float(e) for name, e in document["errors"][side].items()} for side in SIDES}, {})
            base = {side: next(s for s in menus[side].values() if _name(s) == document["base"][side]) for side in SIDES}
            fitted, stamp = load_layer(_tables_path(directory, index), base)
            if stamp.request_sha256 == request_sha256:
                trial = Trial(trial.errors, {side: (base[side], fitted.tables[side]) for side in SIDES})
    return trial


def _name(spec: CodecSpec, keys: CodecSpec | None = None) -> str:
    if spec.predicted and keys is not None:
        return digest([codec_facts(spec), codec_facts(keys)])
    return digest(codec_facts(spec))


def _tables_path(directory: Path, index: int) -> Path:
    return directory / f"trial_{index:03d}.safetensors"


def _errors_path(directory: Path, index: int) -> Path:
    return directory / f"trial_{index:03d}.json"
