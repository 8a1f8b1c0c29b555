from typing import Any

import pytest
import torch

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles
from pqkv_kernels.format.rotary import rotate, unit_angles, unrotate

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("phi3", {}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("olmo2", {}),
    ("glm4", {}),
    ("helium", {}),
    ("ernie4_5", {}),
    ("stablelm", {}),
    ("granite", {}),
    ("smollm3", {}),
]
IDS = [
    name if not changes.get("rope_parameters") else f"{name}-{changes['rope_parameters']['rope_type']}"
    for name, changes in FAMILIES
]


class LastStep:
    def __init__(self) -> None:
        self.steps: dict[int, AttentionStep] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.steps[layer_index] = step


def observed(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> dict[int, AttentionStep]:
    seen = LastStep()
    with torch.no_grad(), tap(model, seen):
        model(ids, position_ids=positions, use_cache=False)
    return seen.steps


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES, ids=IDS)
def test_unrotated_keys_do_not_depend_on_the_position(
    tiny: Any, ids: torch.Tensor, model_type: str, changes: dict[str, Any]
) -> None:
    """Keys of layer 0 before rotary embedding are a function of the token alone: the proof that the layout is right."""
    model = tiny(model_type, "eager", **changes)
    layout = geometry(model.config).layers[0].rotary
    assert layout is not None
    angles = rotary_angles(model, 0)
    found = []
    for offset in (0, 77):
        positions = (torch.arange(12) + offset).expand(2, -1)
        step = observed(model, ids, positions)[0]
        cos, sin = angles(positions)
        found.append(unrotate(step.keys.float(), cos[:, None], sin[:, None], layout))
        torch.testing.assert_close(rotate(found[-1], cos[:, None], sin[:, None], layout), step.keys.float())
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("offset", [0, 4096, 131072])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "glm4"])
def test_angles_are_the_models_own(tiny: Any, ids: torch.Tensor, model_type: str, offset: int) -> None:
    changes = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]} if model_type == "gemma3_text" else {}
    model = tiny(model_type, "eager", **changes)
    positions = (torch.arange(12) + offset).expand(2, -1)
    for index, step in observed(model, ids, positions).items():
        layout = geometry(model.config).layers[index].rotary
        assert layout is not None and step.cos is not None and step.sin is not None
        cos, sin = rotary_angles(model, index)(positions)
        assert cos.dtype == sin.dtype == torch.float32
        expected = unit_angles(step.cos, step.sin, layout)
        assert torch.equal(cos, expected[0].expand_as(cos))
        assert torch.equal(sin, expected[1].expand_as(sin))


def test_angles_are_fp32_in_a_half_precision_model(tiny: Any) -> None:
    positions = torch.tensor([[0, 1, 100_000]])
    expected = rotary_angles(tiny("llama"), 0)(positions)
    model = tiny("llama", dtype=torch.bfloat16)
    found = rotary_angles(model, 0)(positions)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.allclose(torch.hypot(*found), torch.ones(1, 3, 8))


def test_a_layer_that_is_not_rotated_is_refused(tiny: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="post_rope"):
        rotary_angles(tiny("gpt2"), 0)
