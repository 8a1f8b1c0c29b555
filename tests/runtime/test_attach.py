import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny_chain import tiny_llama, tokens

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.errors import ArtifactError, CacheError, UnsupportedModelError, UsageError
from pqkv_cli.runtime import Artifact, attach, simulate_artifact
from pqkv_cli.specs import CacheSpec


def hooks(model: Any) -> list[OrderedDict]:
    return [dict(module._forward_pre_hooks) | dict(module._forward_hooks) for module in model.modules()]


@torch.no_grad()
def logits(model: Any, cache: Any = None) -> torch.Tensor:
    return model(tokens(2, 200), past_key_values=cache, use_cache=cache is not None).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detach_leaves_no_trace(model: Any, artifact: Artifact, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    before, hooks_before = logits(model), hooks(model)
    attached = attach(model, artifact)
    assert model.config._attn_implementation == "pqkv"
    assert hooks(model) != hooks_before
    for _ in range(2):  # more often than once is harmless
        attached.detach()
        assert model.config._attn_implementation == implementation
        assert hooks(model) == hooks_before
    assert torch.equal(logits(model), before)


def test_the_context_detaches_after_a_failure_too(model: Any, artifact: Artifact) -> None:
    hooks_before = hooks(model)
    with pytest.raises(ZeroDivisionError), attach(model, artifact):
        raise ZeroDivisionError
    assert (model.config._attn_implementation, hooks(model)) == ("sdpa", hooks_before)


def test_without_a_quantized_cache_an_attached_model_is_what_it_was(model: Any, artifact: Artifact) -> None:
    before = logits(model)
    with attach(model, artifact):
        assert torch.equal(logits(model), before)


def test_other_things_than_a_model_and_an_artifact_are_refused(model: Any, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"the artifact is a \w+Path; expected what pqkv_cli\.runtime\.load"):
        attach(model, artifact.path)  # type: ignore[arg-type]
    for thing in (torch.nn.Linear(2, 2), None):
        with pytest.raises(UsageError, match=r"the model is a \w+; expected a causal language model.*pipeline\.model"):
            attach(thing, artifact)


def test_attach_twice_is_refused(model: Any, artifact: Artifact) -> None:
    first = attach(model, artifact)
    with pytest.raises(CacheError, match=r"attached already; call detach\(\)"):
        attach(model, artifact)
    first.detach()
    second = attach(model, artifact)
    first.detach()
    assert model.config._attn_implementation == "pqkv", "an old handle must not undo what is not its own"
    second.detach()


def test_an_artifact_of_another_model_needs_force(artifact: Artifact) -> None:
    other = tiny_llama(seed=1)
    with pytest.raises(ArtifactError, match=r"made for another model:\n.*weights"):
        attach(other, artifact)
    with pytest.raises(ArtifactError, match="made for another model"):
        simulate_artifact(other, artifact)
    assert other.config._attn_implementation == "sdpa"
    with pytest.warns(UserWarning, match="weights: the artifact is for tiny"), attach(other, artifact, force=True) as attached:
        assert logits(other, attached.new_cache()).isfinite().all()


def test_another_geometry_is_refused_even_with_force(artifact: Artifact) -> None:
    for changes in ({"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 8}):
        with pytest.raises(ArtifactError, match="whose attention is not that of"):
            attach(tiny_llama(**changes), artifact, force=True)


def test_a_model_with_attention_of_its_own_is_refused_and_left_alone(
    model: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
    hooks_before = hooks(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM keeps its own attention"):
        attach(model, artifact)
    monkeypatch.undo()
    assert hooks(model) == hooks_before
    attach(model, artifact).detach()


def test_the_right_model_gives_no_warning(model: Any, artifact: Artifact) -> None:
    with warnings.catch_warnings(), attach(model, artifact):
        warnings.simplefilter("error")


def test_the_cache_keeps_exact_what_the_artifact_or_the_caller_says(model: Any, artifact: Artifact) -> None:
    for wanted, expected in ((None, artifact.header.plan.cache), (CacheSpec(0, 128), CacheSpec(0, 128))):
        with attach(model, artifact, cache=wanted) as attached:
            cache = attached.new_cache()
        assert isinstance(cache, QuantizedCache)
        assert [layer.spec for layer in cache.quantized_layers] == [expected] * 2


def test_a_cache_without_attach_is_refused(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
    with pytest.raises(CacheError, match="attach"):
        logits(model, cache)


def test_simulation_quantizes_everything_and_leaves_no_trace(model: Any, artifact: Artifact) -> None:
    before, hooks_before = logits(model), hooks(model)
    with simulate_artifact(model, artifact) as simulation:
        assert model.config._attn_implementation == "sdpa"
        changed = logits(model, simulation.new_cache())
    assert hooks(model) == hooks_before
    assert torch.equal(logits(model), before)
    assert not torch.equal(changed, before)
    assert (changed.argmax(-1) == before.argmax(-1)).float().mean() > 0.7
