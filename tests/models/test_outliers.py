"""Outliers that do not change the model: equal logits, other keys and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pqkv_cli.baselines.outliers import inject, injected, layer_gauge, outlier_gauges
from pqkv_cli.errors import UnsupportedModelError, UsageError
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.specs import LayerGeometry
from pqkv_kernels.format.layout import RotaryLayout

# GQA everywhere; biases; norms shared by heads and norms over all heads; fused and partial; interleaved pairs.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "glm": {},
}


class Seen:
    def __init__(self) -> None:
        self.steps: dict[int, AttentionStep] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.steps[layer_index] = step


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[int, AttentionStep]]:
    seen = Seen()
    with torch.no_grad(), tap(model, seen):
        logits = model(ids).logits
    return logits, seen.steps


def randomized(model: Any) -> Any:
    """Give biases and norm weights other values than zero and one."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += torch.rand(parameter.shape, generator=g) - 0.5
            elif "self_attn" in name:
                parameter *= 8
    return model


@pytest.mark.parametrize("name", list(FAMILIES))
def test_power_of_two_outliers_change_no_bit_of_the_logits(name: str, tiny: Callable[..., Any], ids: torch.Tensor) -> None:
    model = randomized(tiny(name, **FAMILIES[name]))
    before, plain = run(model, ids)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    gauges = outlier_gauges(model, 16.0, seed=1)
    with injected(model, gauges):
        after, loud = run(model, ids)
    assert torch.equal(before, after)
    for index, step in loud.items():
        ratio = step.values.abs().amax((0, 2)) / plain[index].values.abs().amax((0, 2))
        assert torch.equal(ratio.sort(dim=1).values, torch.tensor([[1.0] * 14 + [16.0] * 2] * 2))
        norms = step.keys.square().sum((0, 2)) / plain[index].keys.square().sum((0, 2))
        assert float(norms.max()) > 200 and float(norms.min()) == pytest.approx(1, rel=0.1)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, ids)[0], before)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "glm"])
def test_turns_and_dense_value_maps_change_the_logits_by_rounding_only(
    name: str, tiny: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = randomized(tiny(name, **FAMILIES[name]))
    before, plain = run(model, ids)
    g = torch.Generator().manual_seed(2)
    gauges = {}
    for index, layer in enumerate(geometry(model.config).layers):
        assert layer.rotary is not None
        pairs = (layer.num_kv_heads, layer.rotary.num_pairs)
        dense = torch.randn(layer.num_kv_heads, layer.head_dim, layer.head_dim, generator=g, dtype=torch.float64)
        gauges[index] = layer_gauge(
            layer,
            pair_scale=torch.rand(pairs, generator=g) * 9 + 1,
            pair_angle=torch.rand(pairs, generator=g) * 6,
            value_map=dense + 4 * torch.eye(layer.head_dim),
        )
    inject(model, gauges)
    after, other = run(model, ids)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    for index, gauge in gauges.items():
        expected = plain[index].values @ gauge.value_map.float().mT
        torch.testing.assert_close(other[index].values, expected, rtol=1e-3, atol=1e-3)
        # A gauge of keys commutes with rotary embedding: it can be seen on the rotated ones.
        expected = plain[index].keys @ gauge.key_map.float().mT
        torch.testing.assert_close(other[index].keys, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0, -2.0, float("nan"), float("inf")])
def test_other_scales_are_refused(scale: float, tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="the outlier scale is .*; expected a power of two, 2 or more"):
        outlier_gauges(tiny(), scale)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma3_text",
            {"layer_types": ["full_attention"] * 3},
            r"layer 0 has the norm q_norm of type Gemma3RMSNorm; expected",
        ),
        ("olmo", {"clip_qkv": 4.0}, r"clips queries, keys and values at a fixed bound \(clip_qkv\)"),
        ("gpt_neox", {}, r"layer 0 has the children .*; expected q_proj, k_proj, v_proj or qkv_proj; outliers cannot"),
    ],
)
def test_models_that_it_would_change_are_refused(
    name: str, changes: dict[str, Any], message: str, tiny: Callable[..., Any]
) -> None:
    model = tiny(name, **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=message):
        inject(model, outlier_gauges(model, 4.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_norms_forbid_turns_and_scales_of_single_heads(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen3")
    layer = geometry(model.config).layers[0]
    with pytest.raises(UnsupportedModelError, match="layer 0 normalizes its keys .*; expected pairs that are scaled only"):
        inject(model, {0: layer_gauge(layer, pair_angle=torch.ones(2, 8))})
    uneven = torch.ones(2, 8)
    uneven[1, 3] = 4
    with pytest.raises(UnsupportedModelError, match="keys of all heads with one weight; expected the same scales"):
        inject(model, {0: layer_gauge(layer, pair_scale=uneven)})


LAYER = LayerGeometry(4, 2, 8, RotaryLayout(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pair_scale": torch.ones(2, 3)}, r"pair_scale has shape \[2, 3\]; expected \[2, 2\]"),
        ({"pair_angle": torch.ones(1, 2)}, r"pair_angle has shape \[1, 2\]; expected \[2, 2\]"),
        ({"pair_scale": torch.zeros(2, 2)}, "pair_scale holds zeros"),
        ({"value_map": torch.ones(2, 7)}, r"value_map has shape \[2, 7\]; expected \[2, 8\] or \[2, 8, 8\]"),
        ({"value_map": torch.ones(2, 8, 8)}, "value_map of head 0 cannot be inverted"),
        ({"value_map": torch.zeros(2, 8)}, "value_map of head 0 cannot be inverted"),
    ],
)
def test_maps_that_are_none_are_refused(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer_gauge(LAYER, **given)


def test_layers_without_pairs_take_value_maps_only() -> None:
    plain = LayerGeometry(4, 2, 8, None)
    with pytest.raises(UsageError, match="for a layer without rotary pairs"):
        layer_gauge(plain, pair_scale=torch.ones(2, 2))
    gauge = layer_gauge(plain, value_map=torch.full((2, 8), 4.0))
    assert torch.equal(gauge.value_map @ gauge.output_map, torch.eye(8, dtype=torch.float64).repeat(2, 1, 1))
