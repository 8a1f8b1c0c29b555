"""Every recipe against the published shape of its model."""

import pytest
from published_models import MODELS, WEIGHTS, config_of

from pqkv_cli.fitting.plan import uniform_plan
from pqkv_cli.hf.configs import text_config
from pqkv_cli.models.footprint import weights
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.recipe_files import named_recipe, recipe_names
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.format.layout import RotaryLayout


def test_every_recipe_has_a_row() -> None:
    assert set(recipe_names()) == {*MODELS, "demo"}
    assert set(MODELS) == set(WEIGHTS)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_as_many_as_the_card_says(name: str) -> None:
    assert weights(config_of(name)).num_parameters / 1e9 == pytest.approx(WEIGHTS[name][3], rel=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_the_shape_is_the_published_one(name: str) -> None:
    known = MODELS[name]
    shape = geometry(config_of(name))
    check_quantizable(shape)
    assert (len(shape.layers), shape.max_positions) == (known.num_layers, known.max_positions)
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in shape.layers} == {known.heads}
    quantized = tuple(i for i, layer in enumerate(shape.layers) if not layer.dense_reason)
    assert quantized == (tuple(range(known.num_layers)) if known.quantized is None else known.quantized)
    assert [i for i in quantized if shape.layers[i].rotary is None] == list(known.unrotated)
    assert {shape.layers[i].rotary for i in quantized if i not in known.unrotated} == {RotaryLayout(known.heads[2])}
    assert shape.decoded_reason == ""


@pytest.mark.parametrize("name", MODELS)
def test_the_rotary_embedding_is_the_published_one(name: str) -> None:
    rope = text_config(config_of(name)).rope_parameters
    rope = rope.get("full_attention", rope)
    assert (float(rope["rope_theta"]), rope["rope_type"]) == (MODELS[name].rope_theta, MODELS[name].rope_type)


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_fits_the_model(name: str) -> None:
    recipe, shape = named_recipe(name), geometry(config_of(name))
    assert recipe.model == MODELS[name].model
    assert recipe.calibration.seq_len <= shape.max_positions
    cache = CacheSpec(recipe.cache.num_sinks, recipe.cache.window_tokens)
    plan = uniform_plan(shape, recipe.codebooks.bits, cache)
    assert [not layer.dense_reason for layer in plan.layers] == [not layer.dense_reason for layer in shape.layers]


def test_the_reference_model_is_what_the_package_holds() -> None:
    recipe = named_recipe("demo")
    shape = geometry(load_config(resolve_model(recipe.model)))
    assert len(shape.layers) >= 2 and {layer.head_dim for layer in shape.layers} == {64}
    assert recipe.calibration.seq_len <= shape.max_positions
