"""The outlier test: our codes and codebooks do not notice outliers, bit for bit; a codebook shared by all does."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, fit_artifact, tiny_llama, tokens

from pqkv_cli.baselines.comparison import compare, metrics, own_contestant, rival_contestant
from pqkv_cli.baselines.outlier_comparison import (
    GaugedCodec,
    GaugedSource,
    gauged_samples,
    largest_difference,
    own_with_outliers,
)
from pqkv_cli.baselines.outliers import injected, outlier_gauges
from pqkv_cli.baselines.registry import parse_rivals
from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.store import CalibrationStore, LayerSamples
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.fitting.fit import fit_layer
from pqkv_cli.fitting.plan import uniform_plan
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.models.geometry import geometry
from pqkv_cli.quantizers.codec import ProductCodec
from pqkv_cli.runtime import load
from pqkv_cli.specs import SIDES, CacheSpec
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import quantize, to_code_space

SCALE = 16.0
COLLECT = CollectSettings("0" * 64, num_samples=20, seq_len=64, batch_size=4, queries_per_window=8, fisher_draws=1)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CalibrationStore, CalibrationStore]:
    """Return a model, its calibration, and the calibration of the same model with outliers."""
    model, windows = tiny_llama(), tokens(20, 64, seed=4)
    stores = []
    for name in ("plain", "loud"):
        directory = tmp_path_factory.mktemp(name)
        if name == "plain":
            collect(model, windows, directory, COLLECT, lambda done, total: None)
        else:
            with injected(model, outlier_gauges(model, SCALE)):
                collect(model, windows, directory, COLLECT, lambda done, total: None)
        stores.append(CalibrationStore(directory))
    return model, stores[0], stores[1]


def test_gauged_samples_are_those_of_a_calibration_with_outliers(
    calibrated: tuple[Any, CalibrationStore, CalibrationStore],
) -> None:
    model, plain, loud = calibrated
    source = GaugedSource(plain, outlier_gauges(model, SCALE), geometry(model.config).layers)
    for index in range(2):
        derived, real = source.layer(index), loud.layer(index)
        for field in fields(LayerSamples):
            first, second = getattr(derived, field.name), getattr(real, field.name)
            if not isinstance(first, torch.Tensor):
                assert first == second
                continue
            assert first.dtype == second.dtype
            # Half precision rounds the tiniest numbers away where nothing scales them up.
            atol = 2.0**-24 * SCALE if first.dtype == torch.float16 else 0.0
            torch.testing.assert_close(first, second, rtol=0, atol=atol, msg=field.name)
        assert not torch.equal(real.keys, plain.layer(index).keys)


def _codes(x: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    return quantize(to_code_space(x, tables, rotated=False), tables.layout, tables.codebooks)[0]


@pytest.mark.parametrize(("bits", "weighting"), [(4, "sqrt"), (4, "fisher"), (2, "sqrt")])
def test_codebooks_and_codes_fitted_with_outliers_are_the_same_bit_for_bit(
    bits: int, weighting: Weighting, calibrated: tuple[Any, CalibrationStore, CalibrationStore]
) -> None:
    model, plain, loud = calibrated
    shape = geometry(model.config)
    plan = uniform_plan(shape, bits, CacheSpec())
    settings = FitSettings(iterations=5, key_weighting=weighting, value_weighting=weighting)
    gauges = outlier_gauges(model, SCALE)
    source = GaugedSource(plain, gauges, shape.layers)
    for index in range(2):
        specs = {side: codec for side in SIDES if (codec := plan.codec(index, side)) is not None}
        first = fit_layer(plain.layer(index), shape.layers[index], specs, index=index, settings=settings)
        for other in (source.layer(index), loud.layer(index)):
            second = fit_layer(other, shape.layers[index], specs, index=index, settings=settings)
            for side in SIDES:
                a, b = first.tables[side], second.tables[side]
                assert all(
                    torch.equal(x, y) for s, t in zip(a.codebooks, b.codebooks, strict=True) for x, y in zip(s, t, strict=True)
                )
                plain_x, x = (getattr(s, side)[None].float() for s in (plain.layer(index), other))
                codes = [_codes(plain_x, a), _codes(x, b)]
                assert torch.equal(*codes)
                # Refitting gives what taking the artifact over gives: the decoded vectors are equal bit for bit.
                gauge = gauges[index]
                maps = (gauge.key_map, gauge.query_map.mT) if side == "keys" else (gauge.value_map, gauge.output_map)
                taken = GaugedCodec(ProductCodec(a), *maps).encode_decode(x)
                assert torch.equal(taken, ProductCodec(b).encode_decode(x))


def test_outliers_change_our_divergence_by_nothing_and_a_shared_codebook_suffers(tmp_path: Path) -> None:
    model = tiny_llama()
    artifact = load(fit_artifact(model, tmp_path, 2))
    store = CalibrationStore(tmp_path / "calibration")
    subject = Subject(model, byte_tokenizer(), artifact, "a line of text, not long " * 60)
    settings = EvaluationSettings("all", context=128, limit=3)
    gauges = outlier_gauges(model, SCALE)
    rivals = parse_rivals("million:2,rtn:2")
    ids = tokens(1, 100, seed=5)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    found: list[list[float]] = []
    own = own_contestant(artifact)
    rows = [own, *(rival_contestant(r, store, model, 0) for r in rivals)]
    compare(subject, settings, rows, lambda done, total: None)
    found.append([metrics(row.parts, 0)["kl_bits"]["quantized"] for row in rows])
    with injected(model, gauges):
        assert largest_difference(model, ids, logits) == 0
        source = GaugedSource(store, gauges, geometry(model.config).layers)
        rows = [own_with_outliers(own, gauges), *(rival_contestant(r, source, model, 0) for r in rivals)]
        compare(subject, settings, rows, lambda done, total: None)
        found.append([metrics(row.parts, 0)["kl_bits"]["quantized"] for row in rows])
    (ours, million, rtn), (ours_loud, million_loud, rtn_loud) = found
    assert ours == ours_loud > 0
    assert million_loud > 1.5 * million
    assert rtn_loud > 1.5 * rtn


def test_outliers_that_half_precision_cannot_hold_are_named(
    calibrated: tuple[Any, CalibrationStore, CalibrationStore],
) -> None:
    model, plain, _ = calibrated
    gauge = outlier_gauges(model, 2.0**20)[1]
    with pytest.raises(DataError, match=r"the keys of layer 1 with outliers reach .*; choose a smaller --inject-outliers"):
        gauged_samples(plain.layer(1), gauge, geometry(model.config).layers[1].rotary, 1)
