from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.hf.taps import AttentionStep, tap

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "olmo2",
    "glm4",
    "gpt_neox",
    "gpt2",
]


class Recorder:
    def __init__(self) -> None:
        self.steps: dict[int, AttentionStep] = {}
        self.calls = 0

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.steps[layer_index] = step
        self.calls += 1


def state(model: Any) -> tuple[Any, ...]:
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    implementations = [m.config._attn_implementation for m in attention_modules(model).values()]
    return hooks, implementations, set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_bit_equal_and_all_is_undone(tiny: Any, ids: torch.Tensor, model_type: str, attention: str) -> None:
    if attention == "sdpa" and model_type in ("gpt_oss", "gemma2"):
        pytest.skip(f"transformers has no sdpa for {model_type}")
    model = tiny(model_type, attention)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding: a wrong mask would show
    before = state(model)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        recorder = Recorder()
        with tap(model, recorder):
            tapped = model(ids, attention_mask=mask).logits
        again = model(ids, attention_mask=mask).logits
    assert torch.equal(plain, tapped)
    assert torch.equal(plain, again)
    assert state(model) == before
    assert sorted(recorder.steps) == [0, 1, 2]
    assert recorder.calls == 3


def test_a_step_is_what_attention_sees(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    recorder = Recorder()
    with torch.no_grad(), tap(model, recorder):
        cache = model(ids, use_cache=True).past_key_values
    for index, step in recorder.steps.items():
        assert step.queries.shape == (2, 4, 12, 16)
        assert torch.equal(step.keys, cache.layers[index].keys)
        assert torch.equal(step.values, cache.layers[index].values)
        assert step.cos is not None and step.cos.shape[-2:] == (12, 16)
        assert step.arguments.scaling == 16**-0.5


def test_options_of_the_attention_are_seen(tiny: Any, ids: torch.Tensor) -> None:
    recorder = Recorder()
    with torch.no_grad():
        with tap(model := tiny("gemma2", "eager"), recorder):
            model(ids)
        assert recorder.steps[0].arguments.softcap == model.config.attn_logit_softcapping
        with tap(model := tiny("gpt_oss", "eager"), recorder):
            model(ids)
    assert recorder.steps[0].arguments.sink_logits is not None and recorder.steps[0].arguments.sink_logits.shape == (4,)


def test_a_differentiable_tap_is_inert_and_shows_the_graph(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    before, recorder = state(model), Recorder()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plain = model(ids).logits
    with tap(model, recorder, differentiable=True):
        tapped = model(ids).logits
    assert torch.equal(plain, tapped) and tapped.requires_grad and not plain.requires_grad
    held = [tensor for step in recorder.steps.values() for tensor in (step.keys, step.values)]
    assert all(bool(gradient.abs().sum() > 0) for gradient in torch.autograd.grad(tapped.square().sum(), held))
    assert state(model) == before


def test_generation_with_a_cache(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    recorder = Recorder()
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)
    with tap(model, recorder):
        tapped = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(plain, tapped)
    assert recorder.steps[0].queries.shape[2] == 1
    assert recorder.steps[0].keys.shape[2] == 14


def test_taps_nest(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    before = state(model)
    outer, inner = Recorder(), Recorder()
    with torch.no_grad():
        plain = model(ids).logits
        with tap(model, outer):
            with tap(model, inner):
                assert torch.equal(model(ids).logits, plain)
            assert torch.equal(model(ids).logits, plain)
    assert (outer.calls, inner.calls) == (6, 3)
    assert outer.steps[0].cos is not None
    assert state(model) == before


def test_other_models_are_not_seen(tiny: Any, ids: torch.Tensor) -> None:
    recorder = Recorder()
    with torch.no_grad(), tap(tiny("llama"), recorder):
        tiny("llama")(ids)
    assert recorder.calls == 0


def test_an_error_undoes_everything(tiny: Any, ids: torch.Tensor) -> None:
    class Failing:
        def attention(self, layer_index: int, step: AttentionStep) -> None:
            raise RuntimeError("observer failed")

    model = tiny("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="observer failed"), tap(model, Failing()):
        model(ids)
    assert state(model) == before


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention module"), tap(torch.nn.Linear(2, 2), Recorder()):
        pass


def test_attention_outside_the_interface_is_refused() -> None:
    class PlainAttention(torch.nn.Module):
        layer_idx = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with (
        pytest.raises(UnsupportedModelError, match="attention interface"),
        tap(torch.nn.Sequential(PlainAttention()), Recorder()),
    ):
        pass
