"""Fitting all layers of a run: a file per layer, then `fit.json` as the commit point. Knows no model and prints nothing."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from pqkv_cli.calibration.ranks import Ranks
from pqkv_cli.calibration.store import LayerSamples, SampleStore
from pqkv_cli.errors import RunError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.fit import FittedLayer, fit_layer
from pqkv_cli.fitting.layer_file import LayerStamp, layer_path, load_layer, make_directory, save_layer, tensors_sha256
from pqkv_cli.fitting.record import RECORD_NAME, FitRecord, codec_facts, digest, load_record
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.side_by_side import side_by_side
from pqkv_cli.specs import SIDES, CodecSpec, CompressionPlan, LayerGeometry, ModelGeometry, Side

# Raised whenever the same request would give other bytes: layers fitted by older code are then fitted again.
FIT_VERSION = 7


def fit_codebooks(
    store: SampleStore,
    geometry: ModelGeometry,
    plan: CompressionPlan,
    directory: Path,
    settings: FitSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FitRecord:
    """Fit every layer of `plan` into `directory`.

    Killed at any moment and run again it gives the same bytes: a layer file is kept if it answers the same request (samples,
    formats, geometry, settings), everything else is fitted again. `fit.json` is removed before the first change and written
    last.

    Parameters
    ----------
    store
        Calibration samples.
    geometry
        The model's layers.
    plan
        Formats by layer.
    directory
        Where the files go; made if need be.
    settings
        How to fit.
    on_progress
        Called with (layers done, layers) at the start and after each layer.

    Raises
    ------
    DataError
        If a layer's samples cannot be fitted.
    RunError
        If files cannot be written, or `plan` is of another model.
    UsageError
        If a format does not fit its layer.
    """
    settings = FitSettings() if settings is None else settings
    num_layers = len(plan.layers)
    if num_layers != len(geometry.layers):
        raise RunError(
            f"the plan has {num_layers} layers, the model {len(geometry.layers)}; expected as many; plan again for this model"
        )
    make_directory(directory)
    fit = partial(_layer, store, geometry, plan, directory, settings)
    results = side_by_side(fit, range(num_layers), geometry, on_progress)
    record = FitRecord(
        digest([stamp.request_sha256 for _, stamp in results]),
        plan,
        settings,
        tuple(fitted.relative_error for fitted, _ in results),
        tuple(stamp.tensors_sha256 for _, stamp in results),
    )
    _commit(directory, record)
    return record


def fit_share(
    store: SampleStore, geometry: ModelGeometry, plan: CompressionPlan, directory: Path, settings: FitSettings, ranks: Ranks
) -> None:
    """Fit the layers of one process among several, each process every so-many-th, and wait for the others.

    All of them see `directory`; where `fit_codebooks` looks for layers afterwards, it finds them. Alone there is no share.

    Raises
    ------
    DataError, RunError, UsageError
        As `fit_codebooks`.
    """
    if ranks.size == 1:
        return
    make_directory(directory)
    fit = partial(_layer, store, geometry, plan, directory, settings)
    side_by_side(fit, range(ranks.rank, len(plan.layers), ranks.size), geometry)
    ranks.barrier()


def load_fitted(directory: Path) -> list[FittedLayer]:
    """Return the fitted layers of a finished fit, those that stay dense with empty tables.

    Raises
    ------
    RunError
        If the fit is missing, incomplete or damaged.
    """
    record = load_record(directory)
    layers = []
    for index, expected in enumerate(record.layers_sha256):
        path = layer_path(directory, index)
        fitted, stamp = load_layer(path, layer_specs(record.plan, index))
        if stamp.tensors_sha256 != expected:
            raise RunError(
                f"{path} has hash {stamp.tensors_sha256[:12]}; expected {expected[:12]}, the one in {RECORD_NAME}; "
                "run pqkv fit-codebooks on this run again"
            )
        layers.append(fitted)
    return layers


def layer_specs(plan: CompressionPlan, index: int) -> dict[Side, CodecSpec]:
    """Return the formats of one layer's keys and values, empty where it stays dense."""
    specs = {side: plan.codec(index, side) for side in SIDES}
    return {side: spec for side, spec in specs.items() if spec is not None}


def layer_request(index: int, layer: LayerGeometry, codecs: object, settings: FitSettings, samples: LayerSamples | None) -> str:
    """Return the hash of everything that the codecs of a layer depend on; `codecs` is what is asked for, as in JSON."""
    return digest(
        {
            "method": FIT_VERSION,
            "torch": torch.__version__,
            "layer": index,
            "geometry": asdict(layer),
            "codecs": codecs,
            "settings": asdict(settings),
            "samples": None if samples is None else tensors_sha256(_sample_tensors(samples)),
        }
    )


def _layer(
    store: SampleStore,
    geometry: ModelGeometry,
    plan: CompressionPlan,
    directory: Path,
    settings: FitSettings,
    index: int,
) -> tuple[FittedLayer, LayerStamp]:
    """Return layer `index` from its file if that answers the same request, else fit and write it."""
    specs, layer, path = layer_specs(plan, index), geometry.layers[index], layer_path(directory, index)
    samples = store.layer(index) if specs else None
    request = layer_request(index, layer, {side: codec_facts(spec) for side, spec in specs.items()}, settings, samples)
    with contextlib.suppress(RunError):  # missing or damaged: fitted below
        fitted, stamp = load_layer(path, specs)
        if stamp.request_sha256 == request:
            return fitted, stamp
    (directory / RECORD_NAME).unlink(missing_ok=True)
    fitted = FittedLayer({}, {}) if samples is None else fit_layer(samples, layer, specs, index=index, settings=settings)
    return fitted, save_layer(path, fitted, request)


def _sample_tensors(samples: LayerSamples) -> Mapping[str, torch.Tensor]:
    named = {field.name: getattr(samples, field.name) for field in fields(samples)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _commit(directory: Path, record: FitRecord) -> None:
    """Write `fit.json` and drop the files of layers this plan does not have."""
    kept = {layer_path(directory, index).name for index in range(len(record.layers_sha256))}
    for path in directory.glob("layer_*.safetensors"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    write_text(directory / RECORD_NAME, record.text(), RunError)
