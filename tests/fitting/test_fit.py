from dataclasses import replace
from typing import Any

import fitting_support as support
import pytest
import torch

from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.fit import fit_layer, sample_weights
from pqkv_cli.fitting.plan import rated_specs, uniform_plan
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.rates import RATES, SPEED_RATES, CodeStyle, key_layout, rate_layout
from pqkv_cli.specs import SIDES, CacheSpec, CodecSpec, LayerGeometry, ModelGeometry
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout
from pqkv_kernels.reference.encode import quantize, round_trip, to_code_space
from pqkv_kernels.reference.merged_stages import joint_layout

FAST = FitSettings(iterations=6)


def test_tables_code_the_samples_with_the_stated_error() -> None:
    samples = support.samples(0)
    fitted = fit_layer(samples, support.LAYER, support.SPECS, settings=FAST)
    assert fitted.tables["keys"].rotary == support.LAYER.rotary
    assert fitted.tables["values"].rotary is None
    for side, vectors in (("keys", samples.keys), ("values", samples.values)):
        tables = fitted.tables[side]
        decoded = round_trip(vectors[None], tables, rotated=False)
        coded, decoded = (to_code_space(x, tables, rotated=False) for x in (vectors[None].float(), decoded))
        error = (coded - decoded).square().sum((0, 2, 3)) / coded.square().sum((0, 2, 3))
        torch.testing.assert_close(error, torch.tensor(fitted.relative_error[side]), rtol=1e-3, atol=1e-6)
        assert (error < 0.3).all()


def test_values_are_coded_in_the_metric_of_the_output_up_to_a_power_of_two() -> None:
    samples = support.samples(1)
    matrix = fit_layer(samples, support.LAYER, support.SPECS, settings=FAST).tables["values"].map
    assert matrix is not None
    ratio = (matrix.double().mT @ matrix.double()).diagonal(dim1=1, dim2=2) / samples.output_gram.diagonal(dim1=1, dim2=2)
    exponent = ratio.log2() / 2
    torch.testing.assert_close(exponent, exponent.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_power_of_two_gauges_change_no_code_and_no_codebook(seed: int) -> None:
    # Factors >= 1 only: smaller ones push fp16 samples into subnormals, which lose bits.
    samples = support.samples(seed)
    g = torch.Generator().manual_seed(seed)
    pairs = torch.exp2(torch.randint(0, 5, (support.HEADS, 4), generator=g).double())
    on_keys, on_values = (
        torch.cat((pairs, pairs), 1),
        torch.exp2(torch.randint(0, 5, (support.HEADS, 8), generator=g).double()),
    )
    other = replace(
        samples,
        keys=samples.keys * on_keys[:, None].half(),
        values=samples.values * on_values[:, None].half(),
        query_moment=samples.query_moment / on_keys[:, :, None] / on_keys[:, None],
        pair_moment=samples.pair_moment / pairs[..., None, None].square(),
        output_gram=samples.output_gram / on_values[:, :, None] / on_values[:, None],
    )
    plain, gauged = (fit_layer(s, support.LAYER, support.SPECS, settings=FAST) for s in (samples, other))
    assert plain.relative_error == gauged.relative_error
    for side in SIDES:
        first, second = plain.tables[side], gauged.tables[side]
        assert torch.equal(first.codebooks[0][0], second.codebooks[0][0])
        vectors = [(s.keys if side == "keys" else s.values)[None] for s in (samples, other)]
        spaces = [to_code_space(v, t, rotated=False) for v, t in zip(vectors, (first, second), strict=True)]
        assert torch.equal(*spaces)
        codes = [quantize(x, t.layout, t.codebooks)[0] for x, t in zip(spaces, (first, second), strict=True)]
        assert torch.equal(*codes)


def test_seeds_depend_on_layer_and_side_only() -> None:
    seeds = {FitSettings(seed=s).derived_seed(i, side) for s in (0, 1) for i in range(40) for side in SIDES}
    assert len(seeds) == 160
    first, again = (fit_layer(support.samples(3), support.LAYER, support.SPECS, index=2, settings=FAST) for _ in range(2))
    other = fit_layer(support.samples(3), support.LAYER, support.SPECS, index=3, settings=FAST)
    assert torch.equal(first.tables["keys"].codebooks[0][0], again.tables["keys"].codebooks[0][0])
    assert not torch.equal(first.tables["keys"].codebooks[0][0], other.tables["keys"].codebooks[0][0])


def test_weights_follow_the_mass_damped() -> None:
    mass = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert sample_weights(mass, "none", 0.1) is None
    torch.testing.assert_close(sample_weights(mass, "mass", 0.1), torch.tensor([[0.1, 0.85, 2.35], [1.1, 1.1, 1.1]]))
    torch.testing.assert_close(sample_weights(mass, "sqrt", 0.0)[0], torch.tensor([0.0, 0.75, 2.25]).sqrt())


@pytest.mark.parametrize("weighting", ["none", "sqrt", "mass"])
def test_all_weightings_fit(weighting: str) -> None:
    settings = FitSettings(iterations=3, key_weighting=weighting, value_weighting=weighting, rotate_values=False)
    assert set(fit_layer(support.samples(4), support.LAYER, support.SPECS, settings=settings).tables) == set(SIDES)


def test_layers_without_rotary_and_partial_rotary_fit() -> None:
    keys = replace(support.KEYS, map="identity", key_space="post_rope")
    layer = replace(support.LAYER, rotary=None)
    tables = fit_layer(support.samples(5), layer, {**support.SPECS, "keys": keys}, settings=FAST).tables["keys"]
    assert (tables.map, tables.permutation, tables.rotary) == (None, None, None)
    partial = replace(support.LAYER, rotary=RotaryLayout(4))
    samples = support.samples(5)
    samples = replace(samples, pair_moment=samples.pair_moment[:, :2])
    assert fit_layer(samples, partial, support.SPECS, settings=FAST).tables["keys"].rotary == RotaryLayout(4)


def test_keys_without_rotary_are_coded_in_the_metric_of_their_queries() -> None:
    unrotated = replace(support.LAYER, rotary=None)
    samples = support.samples(5)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5))).Q.double()
    moment = (turn @ torch.diag(torch.logspace(-2, 2, 8).double()) @ turn.mT).expand(support.HEADS, 8, 8)
    samples = replace(samples, query_moment=moment.contiguous())
    plan = uniform_plan(ModelGeometry("x", (unrotated,), 512), 2, CacheSpec(), CodeStyle(prototype_bits=0))
    spec = plan.codec(0, "keys")
    assert spec is not None and (spec.map, spec.key_space) == ("matrix", "post_rope")

    def logit_error(key_spec: CodecSpec) -> float:
        tables = fit_layer(samples, unrotated, {**support.SPECS, "keys": key_spec}, settings=FAST).tables["keys"]
        error = (samples.keys.float() - round_trip(samples.keys[None], tables, rotated=False)[0]).double()
        return float(torch.einsum("hni,hij,hnj->", error, moment, error))

    assert logit_error(spec) < 0.5 * logit_error(replace(spec, map="identity"))


def test_degenerate_heads_are_named() -> None:
    samples = support.samples(6)
    samples.values[1, 3, 2] = torch.inf
    with pytest.raises(DataError, match="layer 7, values: key/value head 1 has NaN or infinite"):
        fit_layer(samples, support.LAYER, support.SPECS, index=7, settings=FAST)
    constant = replace(support.samples(6), keys=torch.ones(2, 700, 8).half(), values=torch.zeros(2, 700, 8).half())
    assert max(fit_layer(constant, support.LAYER, support.SPECS, settings=FAST).relative_error["keys"]) < 1e-6


def test_too_few_vectors_name_the_layer() -> None:
    specs = {**support.SPECS, "keys": replace(support.KEYS, layout=CodeLayout.uniform(8, 2, 10))}
    with pytest.raises(DataError, match="layer 0, keys: found 700 vectors for 1024 centroids"):
        fit_layer(support.samples(0), support.LAYER, specs, settings=FAST)


@pytest.mark.parametrize(
    ("keys", "layer", "message"),
    [
        (support.KEYS, replace(support.LAYER, rotary=None), "a layer without rotary embedding"),
        (replace(support.KEYS, map="matrix"), support.LAYER, "the map 'matrix' for codes before .*; expected one of blocks"),
        (replace(support.KEYS, map="metric"), support.LAYER, "the map 'metric' for codes before rotary embedding"),
        (
            replace(support.KEYS, key_space="post_rope"),
            support.LAYER,
            "samples in the key space .pre_rope. for codes in .post_rope.",
        ),
        (replace(support.KEYS, layout=CodeLayout.uniform(16, 4, 4)), support.LAYER, "covers 16 channels; expected head_dim 8"),
    ],
)
def test_formats_that_do_not_fit_are_refused(keys: object, layer: LayerGeometry, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_layer(support.samples(0), layer, {**support.SPECS, "keys": keys}, settings=FAST)


def test_values_have_no_blocks() -> None:
    values = replace(support.VALUES, map="blocks")
    with pytest.raises(UsageError, match="layer 0, values: found the map 'blocks' for values; expected one of matrix, scale"):
        fit_layer(support.samples(0), support.LAYER, {**support.SPECS, "values": values}, settings=FAST)


def test_settings_are_checked() -> None:
    for bad in ({"iterations": 0}, {"damping": -1.0}, {"key_weighting": "masse"}):
        with pytest.raises(UsageError, match="expected"):
            FitSettings(**bad)


@pytest.mark.parametrize("prototype_bits", [0, 8, 10])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", list(RATES))
def test_layouts_have_exactly_their_rate(bits: float, head_dim: int, prototype_bits: int) -> None:
    style = CodeStyle(prototype_bits=prototype_bits)
    if head_dim % RATES[bits]:
        with pytest.raises(UsageError, match="not divisible .*; choose --bits 5 or"):
            rate_layout(bits, head_dim, style)
        return
    for layout in (rate_layout(bits, head_dim, style), key_layout(bits, head_dim, style)):
        assert layout.bits_per_channel == bits and layout.head_dim == head_dim
        assert all(len(stage) <= 3 for stage in layout.stages)
        first = layout.stages[0][0]
        if prototype_bits and head_dim >= 64:
            assert (first.num_subspaces, first.nbits, first.subspace_dim) == (1, prototype_bits, head_dim)
        if len(layout.stages) > 1:
            assert first.subspace_dim == head_dim and 2 * first.nbits <= bits * head_dim
        elif prototype_bits:
            assert bits * head_dim < 16


@pytest.mark.parametrize("prototype_bits", [None, 0, 10])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", list(SPEED_RATES))
def test_speed_layouts_have_small_tables(bits: float, head_dim: int, prototype_bits: int | None) -> None:
    style, (dim, stages) = CodeStyle("speed", prototype_bits), SPEED_RATES[bits]
    if head_dim % dim:
        with pytest.raises(UsageError, match="not divisible"):
            rate_layout(bits, head_dim, style)
        return
    for layout in (rate_layout(bits, head_dim, style), key_layout(bits, head_dim, style)):
        assert layout.bits_per_channel == bits
        parts = layout.stages[-len(stages) :]
        assert len(layout.stages) - len(parts) in ({0, 1} if prototype_bits else {0})
        assert len(layout.stages) > len(parts) or not prototype_bits or head_dim < 64
        assert all(group.nbits <= 4 and group.subspace_dim == dim for stage in parts for group in stage)
        assert len(joint_layout(CodeLayout(parts)).layout.stages) == 1  # their sums are searched, not one after the other


@pytest.mark.parametrize(("bits", "subspaces", "nbits"), [(4, 32, 8), (3, 32, 6), (2, 16, 8), (1, 8, 8)])
def test_uniform_plan_names_and_layouts(bits: int, subspaces: int, nbits: int) -> None:
    layer = LayerGeometry(4, 2, 64, RotaryLayout(64))
    geometry = ModelGeometry("llama", (layer, replace(layer, dense_reason="sliding window")), 4096)
    plan = uniform_plan(geometry, bits, CacheSpec(1, 2), CodeStyle(prototype_bits=0))
    assert set(plan.codecs) == {f"k{bits}", f"v{bits}"}
    assert plan.codecs[f"k{bits}"].key_space == "pre_rope"
    assert plan.codecs[f"v{bits}"].layout == CodeLayout.uniform(64, subspaces, nbits)
    assert plan.codec(1, "keys") is None
    assert plan.cache == CacheSpec(1, 2)


def test_uniform_plan_tells_layers_apart() -> None:
    layer = LayerGeometry(4, 2, 64, RotaryLayout(64))
    geometry = ModelGeometry("x", (layer, replace(layer, head_dim=128), replace(layer, rotary=None)), 4096)
    plan = uniform_plan(geometry, 2, CacheSpec())
    assert set(plan.codecs) == {"k2_d64", "v2_d64", "k2_d128", "v2_d128", "k2_d64_nope"}
    assert plan.codecs["k2_d64_nope"].map == "matrix"


def test_a_style_may_name_other_maps() -> None:
    layer = LayerGeometry(4, 2, 64, RotaryLayout(64))
    geometry = ModelGeometry("x", (layer,), 4096)

    def maps(style: CodeStyle, **changes: Any) -> tuple[str, ...]:
        layers = tuple(replace(each, **changes) for each in geometry.layers)
        plan = uniform_plan(replace(geometry, layers=layers), 2, CacheSpec(), style)
        return tuple(plan.codecs[name].map for name in ("k2", "v2"))

    assert maps(CodeStyle()) == ("blocks", "matrix")
    assert maps(CodeStyle(), rotary=None) == ("matrix", "matrix")
    assert maps(CodeStyle(value_map="identity")) == ("blocks", "identity")
    assert maps(CodeStyle(key_map="scale", value_map="scale")) == ("scale", "scale")
    assert maps(CodeStyle(key_map="matrix"), rotary=None) == ("matrix", "matrix")


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (
            CodeStyle(key_map="matrix"),
            "codebooks.key_map is matrix; expected one of blocks, scale, identity for keys before rotary",
        ),
        (
            CodeStyle(value_map="blocks"),
            "codebooks.value_map is blocks; expected one of matrix, scale, identity for values of 64",
        ),
        (
            CodeStyle(value_map="hadamard"),
            "codebooks.value_map is hadamard; expected one of .*; choose one of them, or leave it out",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(style: CodeStyle, message: str) -> None:
    layer = LayerGeometry(4, 2, 64, RotaryLayout(64))
    with pytest.raises(UsageError, match=message):
        uniform_plan(ModelGeometry("x", (layer,), 4096), 2, CacheSpec(), style)
    with pytest.raises(UsageError, match=message):
        for side in SIDES:
            rated_specs(layer, side, style)


def test_uniform_plan_refuses_what_does_not_fit() -> None:
    dense = LayerGeometry(4, 2, 64, None, "sliding window")
    with pytest.raises(UsageError, match="none of the 1 layers .*sliding window"):
        uniform_plan(ModelGeometry("x", (dense,), 10), 4, CacheSpec())
    with pytest.raises(UsageError, match="not divisible"):
        uniform_plan(ModelGeometry("x", (LayerGeometry(4, 2, 6, None),), 10), 2, CacheSpec())
