"""Values predicted from their keys: the map, what is left to code, and that nobody forgets to put it back."""

from dataclasses import replace
from pathlib import Path

import fitting_support as support
import pytest
import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import UsageError
from pqkv_cli.fitting.fit import FittedLayer, fit_layer, fit_side
from pqkv_cli.fitting.layer_file import load_layer, save_layer
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.trial import NOTHING_TRIED, load_trial, save_trial, try_layer
from pqkv_cli.quantizers.codec import ProductCodec, known_of_values
from pqkv_cli.quantizers.prediction import fit_prediction
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import decode_codes, dequantize, encode, quantize, to_code_space
from pqkv_kernels.reference.prediction import decode_values, left_over, predicted

FAST = FitSettings(iterations=6)
PREDICTED = {**support.SPECS, "values": replace(support.SPECS["values"], predicted=True)}


def related(seed: int, share: float = 0.1) -> LayerSamples:
    """Samples whose values are a linear map of the keys, and `share` of something else."""
    samples, g = support.samples(seed), torch.Generator().manual_seed(seed)
    maps = torch.randn(support.HEADS, 8, 8, generator=g) / 8**0.5
    noise = torch.randn(samples.values.shape, generator=g)
    return replace(samples, values=(samples.keys.float() @ maps.mT + share * noise).half())


def fitted(samples: LayerSamples, specs: dict[Side, object] = PREDICTED) -> FittedLayer:
    return fit_layer(samples, support.LAYER, specs, settings=FAST)  # type: ignore[arg-type]


def test_a_linear_map_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    keys, maps = torch.randn(2, 500, 8, generator=g), torch.randn(2, 8, 8, generator=g)
    found = fit_prediction(keys, keys @ maps.mT + 3, torch.rand(2, 500, generator=g))
    torch.testing.assert_close(found, maps, rtol=0, atol=0.01)


def test_a_channel_that_never_moves_says_nothing() -> None:
    keys = torch.randn(1, 100, 4, generator=torch.Generator().manual_seed(1))
    keys[..., 2] = 7
    found = fit_prediction(keys, keys * 2, None)
    assert torch.isfinite(found).all() and (found[..., 2] == 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_what_keys_say_is_not_coded(seed: int) -> None:
    samples = related(seed)
    plain, found = fitted(samples, support.SPECS), fitted(samples)
    assert found.tables["values"].prediction is not None and plain.tables["values"].prediction is None
    for one, other in zip(found.relative_error["values"], plain.relative_error["values"], strict=True):
        assert one < 0.5 * other
    assert found.relative_error["keys"] == plain.relative_error["keys"]


def test_the_stated_error_is_that_of_coding() -> None:
    samples = related(2)
    tables = fitted(samples).tables
    codec = ProductCodec(tables["values"])
    keys = ProductCodec(tables["keys"]).encode_decode(samples.keys[None].float())
    known = known_of_values(keys, tables["keys"], tables["values"])
    decoded = codec.encode_decode(samples.values[None].float(), known)
    exact, found = (to_code_space(x.float(), tables["values"], rotated=False) for x in (samples.values[None], decoded))
    error = (exact - found).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))
    torch.testing.assert_close(error, torch.tensor(fitted(samples).relative_error["values"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_power_of_two_gauges_change_nothing(seed: int) -> None:
    samples, g = related(seed), torch.Generator().manual_seed(seed)
    pairs = torch.exp2(torch.randint(0, 4, (support.HEADS, 4), generator=g).double())
    on_keys = torch.cat((pairs, pairs), 1)
    on_values = torch.exp2(torch.randint(0, 4, (support.HEADS, 8), generator=g).double())
    other = replace(
        samples,
        keys=samples.keys * on_keys[:, None].half(),
        values=samples.values * on_values[:, None].half(),
        query_moment=samples.query_moment / on_keys[:, :, None] / on_keys[:, None],
        pair_moment=samples.pair_moment / pairs[..., None, None].square(),
        output_gram=samples.output_gram / on_values[:, :, None] / on_values[:, None],
    )
    one, two = fitted(samples), fitted(other)
    assert one.relative_error == two.relative_error
    for side in SIDES:
        assert torch.equal(one.tables[side].codebooks[0][0], two.tables[side].codebooks[0][0])
    first, second = (layer.tables["values"].prediction for layer in (one, two))
    assert first is not None and second is not None and torch.equal(first, second)


def test_values_that_keys_say_wholly_stay_inside_fp16() -> None:
    tables = fitted(related(3, share=0)).tables["values"]
    assert tables.prediction is not None and torch.isfinite(tables.prediction).all()


def test_pages_hold_what_is_left_over() -> None:
    tables = fitted(related(4)).tables
    keys, values = (torch.randn(1, support.HEADS, 128, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    angles = (torch.ones(1, 128, 4), torch.zeros(1, 128, 4))
    key_pages = encode(keys, tables["keys"], angles)
    value_pages = encode(left_over(values, key_pages, tables["keys"], tables["values"]), tables["values"])
    # By hand, in code space.
    said = predicted(decode_codes(key_pages, tables["keys"]), tables["values"])
    own = tables["values"]
    codes = quantize(to_code_space(values, own) - said, own.layout, own.codebooks)
    expected = said + dequantize(codes, own.layout, own.codebooks)
    found = decode_values(key_pages, value_pages, tables["keys"], own)
    assert float(((found - expected).abs() > 1e-3).float().mean()) < 0.01  # rounding may decide between two centroids


def test_layer_files_hold_it(tmp_path: Path) -> None:
    layer = fitted(related(5))
    save_layer(tmp_path / "layer", layer, "0" * 64)
    loaded, _ = load_layer(tmp_path / "layer", PREDICTED)
    first, second = (each.tables["values"].prediction for each in (layer, loaded))
    assert first is not None and second is not None and torch.equal(first, second)


def test_trials_of_predicted_values_belong_to_their_keys(tmp_path: Path) -> None:
    menus = {side: {2.0: PREDICTED[side]} for side in SIDES}
    trial = try_layer(related(6), support.LAYER, menus, 2.0, index=0, settings=FAST)
    assert trial.answers(menus, 2.0) and trial.tables["values"][1].prediction is not None
    save_trial(tmp_path, 0, trial, "0" * 64)
    known = load_trial(tmp_path, 0, menus, "0" * 64)
    assert known.errors == trial.errors and known.answers(menus, 2.0)
    plain = {side: {2.0: support.SPECS[side]} for side in SIDES}
    assert not known.answers(plain, 2.0)
    other_keys = replace(known, tables={**known.tables, "keys": (replace(PREDICTED["keys"], map="identity"), CODELESS)})
    assert not other_keys.answers(menus, 2.0)
    assert try_layer(related(6), support.LAYER, menus, 2.0, index=0, settings=FAST, known=NOTHING_TRIED).errors == trial.errors


CODELESS: CodecTables = fit_layer(support.samples(0), support.LAYER, support.SPECS, settings=FAST).tables["keys"]


def test_values_are_refused_without_their_keys() -> None:
    samples = related(7)
    with pytest.raises(UsageError, match="keys that have no codec"):
        fit_side(samples, support.LAYER, PREDICTED["values"], "values", 0, FAST)
    codec = ProductCodec(fitted(samples).tables["values"])
    with pytest.raises(UsageError, match="predicted from their keys, and were given without them"):
        codec.encode_decode(samples.values[None].float())


def test_values_of_zero_are_predicted_as_zero() -> None:
    samples = support.samples(8)
    tables = fitted(replace(samples, values=torch.zeros_like(samples.values))).tables["values"]
    assert tables.prediction is not None and not tables.prediction.any()


def test_keys_are_not_predicted() -> None:
    tables = fitted(related(9)).tables
    with pytest.raises(KernelError, match="for keys; expected"):
        replace(tables["keys"], prediction=tables["values"].prediction)
