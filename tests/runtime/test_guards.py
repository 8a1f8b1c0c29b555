"""Nothing is silently another model: what attention over codes cannot do is refused, misleading settings are not used."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from tiny_chain import byte_tokenizer, fit_artifact, tiny_llama, tokens
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, pipeline

from pqkv_cli.errors import CacheError, UnsupportedModelError
from pqkv_cli.hf.names import CACHE_KEYWORDS
from pqkv_cli.runtime import Artifact, attach, load, simulate_artifact

GREEDY = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)


@pytest.fixture
def prompt() -> torch.Tensor:
    return tokens(2, 190, seed=3)


def generated(model: Any, cache: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"cache": cache, "attention_mask": torch.ones_like(prompt), **GREEDY, **options}
    return model.generate(prompt, **options)


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
def test_a_cache_may_come_under_either_name(
    model: Any, artifact: Artifact, prompt: torch.Tensor, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    with attach(model, artifact) as attached, torch.no_grad():
        expected = generated(model, attached.new_cache(), prompt)
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **{name: attached.new_cache()}, **GREEDY)
        first = model(prompt, **{name: attached.new_cache()}).logits
    assert torch.equal(found, expected)
    assert torch.equal(first[:, -1].argmax(-1), expected[:, prompt.shape[1]])
    assert [str(w.message) for w in recwarn if issubclass(w.category, FutureWarning | DeprecationWarning)] == []


BOTH = ("config.json", "generation_config.json")


@pytest.mark.parametrize("where", [(), BOTH[:1], BOTH[1:], BOTH])
def test_checkpoints_that_say_use_cache_false_use_it(
    artifact: Artifact, prompt: torch.Tensor, tmp_path: Path, where: tuple[str, ...]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    for name in BOTH:
        document = json.loads((tmp_path / name).read_text())
        document.pop("use_cache", None)
        (tmp_path / name).write_text(json.dumps(document | ({"use_cache": False} if name in where else {})))
    if where == BOTH[:1]:
        (tmp_path / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model.config.use_cache, model.generation_config.use_cache
    reference = tiny_llama()
    with attach(reference, artifact) as attached:
        expected = generated(reference, attached.new_cache(), prompt)
    with attach(model, artifact) as attached:
        for options in ({}, {"generation_config": GenerationConfig(use_cache=False, eos_token_id=1)}, {"use_cache": False}):
            cache = attached.new_cache()
            assert torch.equal(generated(model, cache, prompt, **options), expected), options
            assert cache.get_seq_length() == expected.shape[1] - 1
    assert (model.config.use_cache, model.generation_config.use_cache) == before
    assert "generate" not in vars(model)


def test_a_pipeline_made_before_attach_uses_the_cache(artifact: Artifact) -> None:
    model = tiny_llama(use_cache=False)
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    text = "abcdefghij" * 15
    with attach(model, artifact) as attached:
        cache = attached.new_cache()
        write(text, cache=cache, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        assert cache.get_seq_length() == len(text) + 8


def test_a_copy_of_an_attached_model_generates_with_itself(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact):
        other = copy.deepcopy(model)
        assert other.generate.__self__ is other
        with torch.no_grad():
            other.lm_head.weight.neg_()
        found = other.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert not torch.equal(found, model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY))


def test_a_method_that_the_instance_had_is_called_and_comes_back(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return LlamaForCausalLM.generate(model, *args, **kwargs)

    model.generate = own
    with attach(model, artifact) as attached:
        generated(model, attached.new_cache(), prompt)
    assert len(calls) == 1 and calls[0]["use_cache"] is True
    assert model.generate is own


def test_hooks_go_in_any_order(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    for first_to_go in (0, 1):
        hooks = [attach(model, artifact), simulate_artifact(model, artifact)]
        for hook in (hooks[first_to_go], hooks[1 - first_to_go]):
            assert "generate" in vars(model)
            hook.__exit__()
        assert "generate" not in vars(model)
        assert model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY).shape[1] == prompt.shape[1] + 12


def test_a_step_at_a_position_that_is_held_is_refused(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached, torch.no_grad():
        cache = attached.new_cache()
        mask = torch.ones_like(prompt)
        mask[1, :30] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(prompt, attention_mask=mask, position_ids=places, cache=cache)
        wider = torch.cat((mask, mask[:, :3] | 1), dim=1)
        for first in ([0, 0], [189, 200], [190, 159]):
            where = torch.tensor(first)[:, None] + torch.arange(3)
            with pytest.raises(CacheError, match=r"cache of 190 tokens holds already.*use_cache=True.*cache\.reset\(\)"):
                model(prompt[:, :3], attention_mask=wider, position_ids=where, cache=cache)
        for first in ([190, 160], [400, 160]):
            held = copy.deepcopy(cache)
            where = torch.tensor(first)[:, None] + torch.arange(3)
            model(prompt[:, :3], attention_mask=wider, position_ids=where, cache=held)
            assert held.get_seq_length() == 193


def test_a_text_that_was_read_is_refused_wherever_it_began(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt, position_ids=torch.arange(500, 690)[None], cache=cache)
        for first in (500, 600, 689):
            with pytest.raises(CacheError, match="cache of 190 tokens holds already"):
                model(prompt[:, :3], position_ids=first + torch.arange(3)[None], cache=cache)
        model(prompt[:, :3], position_ids=690 + torch.arange(3)[None], cache=cache)
        assert cache.get_seq_length() == 193


def test_a_text_shorter_than_what_is_held_is_refused_in_words(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt, cache=cache)
        with pytest.raises(CacheError, match=r"no token is left behind the 190 that the cache holds.*cache\.reset\(\)"):
            generated(model, cache, prompt[:, :50])
        with pytest.raises(CacheError, match=r"position_ids have shape \[1, 5\]; expected \[2, 3\]"):
            model(prompt[:, :3], position_ids=190 + torch.arange(5)[None], cache=cache)
        with pytest.raises(CacheError, match=r"attention_mask is \[2, 190\]; expected \[2, 380\].*cache\.reset\(\)"):
            model(prompt, attention_mask=torch.ones_like(prompt), cache=cache)


@pytest.mark.parametrize("where", ["checkpoint", "call"])
def test_settings_that_name_a_kind_of_cache_do_not_stand_in_the_way(
    model: Any, artifact: Artifact, prompt: torch.Tensor, where: str
) -> None:
    """As the generation settings of published checkpoints do."""
    with attach(model, artifact) as attached:
        expected = generated(model, attached.new_cache(), prompt)
        settings = model.generation_config if where == "checkpoint" else GenerationConfig(eos_token_id=1)
        settings.cache_implementation = "static"
        options = {} if where == "checkpoint" else {"generation_config": settings}
        assert torch.equal(generated(model, attached.new_cache(), prompt, **options), expected)
        assert settings.cache_implementation == "static"


def test_gradients_are_refused_where_they_are_only_measured_too(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with simulate_artifact(model, artifact) as simulation:
        with pytest.raises(CacheError, match=r"gradients are asked for .*torch\.no_grad\(\)"):
            model(prompt, cache=simulation.new_cache())
        with torch.no_grad():
            model(prompt, cache=simulation.new_cache())
        model.requires_grad_(False)
        model(prompt, cache=simulation.new_cache())


def test_gradients_are_refused_and_inference_is_not(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached:
        with pytest.raises(CacheError, match=r"gradients are asked for .*torch\.no_grad\(\).*requires_grad_\(False\)"):
            model(prompt, cache=attached.new_cache())
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                model(prompt, cache=attached.new_cache())
        model.requires_grad_(False)
        model(prompt, cache=attached.new_cache())


def test_dropout_is_refused(artifact: Artifact, prompt: torch.Tensor) -> None:
    model = tiny_llama(attention_dropout=0.1).train()
    with attach(model, artifact) as attached, torch.no_grad():
        assert model.training, "the check of a step leaves the model as it was"
        cache = attached.new_cache()
        model(prompt, cache=cache)
        with pytest.raises(CacheError, match=r"dropped with probability 0\.1; .*model\.eval\(\)"):
            model(prompt[:, :1], cache=cache)


def bidirectional(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[..., 0, :] = True
    return mask


def blind(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[..., -1, 70] = False
    return mask


@pytest.mark.parametrize("change", [bidirectional, blind])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_masks_that_are_not_causal_are_refused(
    model: Any, artifact: Artifact, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, change: Any, as_numbers: bool
) -> None:
    """As models make them for images, prefixes or packed texts."""
    from transformers.models.llama import modeling_llama

    wrong = []

    def make(**options: Any) -> torch.Tensor:
        held = options.get("cache") or options.get("past_key_values")
        slots = held.get_seq_length() + options["inputs_embeds"].shape[1]
        visible = torch.ones(slots, slots, dtype=torch.bool).tril()[None, None, -options["inputs_embeds"].shape[1] :]
        visible = change(visible) if wrong else visible
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if as_numbers else visible

    monkeypatch.setattr(modeling_llama, "create_causal_mask", make)
    with attach(model, artifact) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt, cache=cache)
        model(prompt[:, :7], cache=cache)  # a causal mask is right
        wrong.append(True)
        with pytest.raises(UnsupportedModelError, match="mask is not causal: tokens see later ones, or not all earlier ones"):
            model(prompt[:, :7], cache=cache)


def test_what_attention_returns_can_be_viewed(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    """On every path, as from the attention functions of transformers themselves."""
    outputs = []
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        projection.register_forward_pre_hook(lambda module, args: outputs.append(args[0].is_contiguous()))
    from pqkv_cli.runtime import attention

    kinds = []
    right = attention.pqkv_attention

    def spy(*args: Any, **options: Any) -> Any:
        output, weights = right(*args, **options)
        kinds.append(output.is_contiguous())
        return output, weights

    with attach(model, artifact) as attached, torch.no_grad():
        from transformers import AttentionInterface

        AttentionInterface.register("pqkv", spy)
        cache = attached.new_cache()
        for piece in prompt.split((150, 1, 39), dim=1):
            model(piece, cache=cache)
        model(prompt)
    attention.register_attention()
    assert len(kinds) == 8 and all(kinds) and all(outputs)


def test_a_class_that_passes_by_its_base_model_is_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=258, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024,
        word_embed_proj_dim=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    try:
        artifact = load(fit_artifact(model, tmp_path))
    except UnsupportedModelError as error:
        assert "base model" in str(error)  # refused even before that
        return
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM passes by its own base model"):
        attach(model, artifact)
    assert model.config._attn_implementation == "sdpa"


class Talkative(LlamaForCausalLM):
    """Hands its attention a keyword that changes what it computes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, position_bias=torch.zeros(1), **kwargs)


class Failing(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        raise ValueError("wants pixels")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Talkative, "hands 'position_bias' to its attention"), (Failing, "a step of one token over .*ValueError: wants pixels")],
)
def test_a_model_that_cannot_take_a_step_is_refused_when_attached(
    model: Any, artifact: Artifact, kind: type, message: str
) -> None:
    model.__class__ = kind
    with pytest.raises(UnsupportedModelError, match=message):
        attach(model, artifact)
    assert model.config._attn_implementation == "sdpa"


def test_wrapped_models_generate_the_same(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached:
        expected = generated(model, attached.new_cache(), prompt)
    wrapped = torch.nn.DataParallel(model)
    with attach(wrapped, artifact) as attached:
        assert attached.model is model
        assert torch.equal(generated(wrapped.module, attached.new_cache(), prompt), expected)
        with torch.no_grad():
            logits = wrapped(prompt, cache=attached.new_cache()).logits
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, prompt.shape[1]])


def test_a_model_with_compiled_layers_is_attached_itself(model: Any, artifact: Artifact, prompt: torch.Tensor) -> None:
    with attach(model, artifact) as attached:
        expected = generated(model, attached.new_cache(), prompt)
    compiled = compile_regions(model, backend="eager")
    with attach(compiled, artifact) as attached:
        assert attached.model is compiled
        assert torch.equal(generated(compiled, attached.new_cache(), prompt), expected)
    assert "generate" not in vars(compiled) and compiled.config._attn_implementation == "sdpa"


def test_tables_of_zeros_are_no_wrong_answers(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
            layer.self_attn.v_proj.weight.zero_()
    artifact = load(fit_artifact(model, tmp_path))
    with attach(model, artifact) as attached:
        assert generated(model, attached.new_cache(), tokens(1, 190)).shape[1] == 202
