"""A tiny random Llama on disk with its own tokenizer, two disjoint texts, and a way to call the command in-process."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pqkv_cli.cli.main import main

WORDS = (
    "once upon a time there was small red house on the hill and old man who liked to read book about far lands "
    "every morning his dog ran down path toward river where fish swim under bright stone bridge"
).split()


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, f"expected one line on stdout, found {self.out!r}"
        return json.loads(self.out)


@pytest.fixture
def pqkv(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Answer]:
    """Run ``pqkv WORDS`` in-process from an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return call


def make_text(seed: int, num_words: int) -> str:
    chosen = random.Random(seed).choices(WORDS, k=num_words)
    return "\n".join(" ".join(chosen[i : i + 12]) + "." for i in range(0, num_words, 12))


def save_tokenizer(directory: Path) -> int:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([make_text(5, 500)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return len(fast)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=save_tokenizer(directory),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a calibration text and an evaluation text."""
    directory = tmp_path_factory.mktemp("texts")
    paths = directory / "calibration.txt", directory / "evaluation.txt"
    for seed, path in enumerate(paths):
        path.write_text(make_text(seed, 3000), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def exported(tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has gone through calibrate, fit-codebooks and export; tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["calibrate", tiny_model, "--data", texts[0], "--samples", 20, "--seq-len", 64, "--batch-size", 4, "-o", run]
    for command in (words, ["fit-codebooks", run, "--bits", 4, "--iterations", 4], ["export", run]):
        assert main([str(word) for word in command]) == 0
    return run
