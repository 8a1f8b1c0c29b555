from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import byte_tokenizer, tokens

from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.runtime import Artifact, attach, load
from pqkv_cli.runtime.generate import GenerateSettings, generate

PROMPT = "".join(chr(97 + i * i % 26) for i in range(200))


def test_load_attach_generate(model: Any, artifact_file: Path) -> None:
    prompt = tokens(1, 150)
    with attach(model, load(artifact_file)) as attached:
        cache = attached.new_cache()
        output = model.generate(prompt, past_key_values=cache, max_new_tokens=80, do_sample=False, eos_token_id=None)
    assert output.shape == (1, 230)
    assert cache.get_seq_length() == 229
    assert cache.slots.stops().tolist() == [128]  # read as codes in the last step, which 228 tokens preceded
    assert cache.num_materialized == 0, "attention over codes must not rebuild the cache"


def test_other_attention_gives_the_same_tokens_by_decoding(model: Any, artifact: Artifact) -> None:
    prompt, found = tokens(2, 150), []
    for implementation in ("pqkv", "sdpa", "eager"):
        with attach(model, artifact) as attached:
            model.set_attn_implementation(implementation)
            cache = attached.new_cache()
            options = dict(past_key_values=cache, max_new_tokens=30, do_sample=False, eos_token_id=None)
            found.append(model.generate(prompt, **options))
            assert (cache.num_materialized == 0) == (implementation == "pqkv")
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_text_comes_piece_by_piece(model: Any, artifact: Artifact) -> None:
    pieces: list[str] = []
    with attach(model, artifact) as attached:
        settings = GenerateSettings(max_new_tokens=20)
        made = generate(attached, byte_tokenizer(), PROMPT, settings, pieces.append)
        silent = generate(attached, byte_tokenizer(), PROMPT, settings)
    assert "".join(pieces) == made.text == silent.text
    assert (made.num_prompt_tokens, made.num_new_tokens <= 20) == (200, True)
    held = made.num_prompt_tokens + made.num_new_tokens - 1  # the last token is never fed back
    assert made.baseline_bytes == held * 2 * 2 * 2 * 16 * 4  # layers, sides, heads, channels, fp32
    assert 0 < made.cache_bytes.codes < made.cache_bytes.total


def test_sampling_follows_the_seed(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        made = [
            generate(attached, byte_tokenizer(), PROMPT, GenerateSettings(16, temperature=3.0, seed=seed)).text
            for seed in (1, 1, 2)
        ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5; expected a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_impossible_settings(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateSettings(**fields)  # type: ignore[arg-type]


def test_prompts_that_do_not_fit(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        with pytest.raises(DataError, match="the prompt has no tokens"):
            generate(attached, byte_tokenizer(), "", GenerateSettings())
        with pytest.raises(DataError, match=r"200 tokens and 825 more.*1024 positions.*at most 824"):
            generate(attached, byte_tokenizer(), PROMPT, GenerateSettings(825))
        with pytest.raises(DataError, match="at most 0"):
            generate(attached, byte_tokenizer(), PROMPT * 6, GenerateSettings(1))
