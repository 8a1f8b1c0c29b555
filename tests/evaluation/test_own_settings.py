"""What a checkpoint's own generation settings may change: nothing in an evaluation, and only the text's shape in generate."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, tiny_llama, tokens
from transformers import GenerationConfig

from pqkv_cli.evaluation.generation import Question, reply
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.runtime import attach
from pqkv_cli.runtime.generate import TEXT_SETTINGS, GenerateSettings, Generation, generate, own_settings

Maker = Callable[..., Subject]
PROMPT = "".join(chr(97 + i * i % 26) for i in range(200))
SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    "repetition": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    "lengths": {"max_length": 3, "min_length": 400},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 7},
    "suppressed tokens": {"suppress_tokens": list(range(100, 250)), "begin_suppress_tokens": list(range(2, 150))},
    "words": {"bad_words_ids": [[i] for i in range(40, 200)], "sequence_bias": [[[30], 90.0]]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "layers compared": {"dola_layers": "high"},
    "groups of beams": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
    "more outputs": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "prompt look-up": {"prompt_lookup_num_tokens": 4},
    "time": {"max_time": 1e-9},
    "strings that stop": {"stop_strings": ["a", "e"]},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.2}},
    "prompts in parts": {"prefill_chunk_size": 16},
    "decay": {"exponential_decay_length_penalty": [1, 5.0]},
}


def with_settings(model: Any, settings: dict[str, Any]) -> Any:
    kept = {"bos_token_id": 0, "eos_token_id": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generation_config = GenerationConfig(**kept)
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
    return model


def replies(made: Subject, settings: dict[str, Any], compressed: bool) -> list[str | None]:
    model = with_settings(tiny_llama(), settings)
    questions = [Question(f"q{i}", tokens(150 - 30 * i, seed=i), 12, min_new_tokens=3) for i in range(2)]
    with attach(model, made.artifact) as attached:
        answered = reply(model, made.tokenizer, questions, attached.new_cache() if compressed else None)
    assert len(answered.cost["step_ms"]) <= 11
    return answered.texts


@pytest.mark.parametrize("compressed", [False, True])
def test_answers_are_those_of_a_checkpoint_that_asks_for_nothing(subject: Maker, compressed: bool) -> None:
    made = subject()
    expected = replies(made, {}, compressed)
    assert all(expected)
    for name, settings in SETTINGS.items():
        assert replies(made, settings, compressed) == expected, name


def made_with(made: Subject, settings: dict[str, Any], **options: Any) -> Generation:
    with attach(with_settings(tiny_llama(), settings), made.artifact) as attached:
        return generate(attached, byte_tokenizer(), PROMPT, GenerateSettings(12, **options))


def test_generate_obeys_what_shapes_text_and_nothing_else(subject: Maker) -> None:
    made = subject()
    expected = made_with(made, {})
    for name, settings in SETTINGS.items():
        found = made_with(made, settings)
        assert found.num_new_tokens <= 12, name
        if not TEXT_SETTINGS & settings.keys():
            assert found == expected, name
    assert made_with(made, SETTINGS["repetition"]).text != expected.text
    assert len(set(made_with(made, SETTINGS["repetition"]).text)) > len(set(expected.text))


def test_the_models_own_settings_come_back() -> None:
    model = with_settings(tiny_llama(), {"num_beams": 3, "something_of_theirs": 1})
    before = model.generation_config
    with pytest.raises(ZeroDivisionError), own_settings(model):
        assert model.generation_config.num_beams is None
        assert model.generation_config.something_of_theirs is None
        assert model.generation_config.eos_token_id == 1
        raise ZeroDivisionError
    assert model.generation_config is before
    assert (before.num_beams, before.something_of_theirs) == (3, 1)


def test_a_checkpoint_without_a_cache_costs_the_same_bytes(subject: Maker) -> None:
    made, model = subject(), tiny_llama()
    model.config.use_cache = False
    with attach(model, made.artifact) as attached:
        found = generate(attached, byte_tokenizer(), PROMPT, GenerateSettings(12))
    assert found == made_with(made, {})
    assert torch.is_grad_enabled()
