"""Training of the reference model, on a model and a text of a size for tests: stages end, and a stopped run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo_model import train as subject
from tools.demo_model.architecture import reference_config
from tools.demo_model.curriculum import STAGES, Goal

TEXT = "def area(width, height): return width * height  # the quick brown fox jumps over 1234 lazy dogs\n" * 40
STEP_TOKENS = 256


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def config():
        made = reference_config()
        made.update(
            {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
        )
        made.num_key_value_heads = 1
        return made

    kinds = {"text": 0.5, "copy": 0.5}
    stages = tuple(
        replace(s, lengths={64: 1.0}, kinds=kinds, tokens_per_step=STEP_TOKENS, max_position=256) for s in STAGES[2:]
    )
    stages = (replace(stages[0], until=0.5, goals=(Goal("copy", 64, 1.1),)), stages[1])
    monkeypatch.setattr(subject, "STAGES", stages)
    monkeypatch.setattr(subject, "reference_config", config)
    monkeypatch.setattr(subject, "split_documents", lambda split: [TEXT, f"{split} {TEXT}"])
    monkeypatch.setattr(subject, "_PROBE_STEPS", 2)
    monkeypatch.setattr(subject, "_PROBE_ROWS", 2)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def trained(out: Path, steps: int) -> dict[str, torch.Tensor]:
    subject.Trainer(out, steps * STEP_TOKENS, seed=3, learning_rate=1e-3).run()
    return load_file(out / "model.safetensors")


def test_a_run_writes_a_model_that_transformers_reads(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["stage"]) for entry in log] == [(2, "long"), (4, "decay")]  # the goal is never met
    assert all(np.isfinite(entry["train_loss"]) for entry in log)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("def area(width", return_tensors="pt").input_ids
    assert bool(torch.isfinite(model(ids).logits).all()) and model.dtype == torch.float16


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", 5)
    step = subject.Trainer._step

    def stopped(trainer: subject.Trainer, stage: object) -> float:
        if trainer.progress.step == 3:
            trainer._save_checkpoint()
            raise KeyboardInterrupt
        return step(trainer, stage)

    monkeypatch.setattr(subject.Trainer, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", 5)
    monkeypatch.setattr(subject.Trainer, "_step", step)
    parts = trained(tmp_path / "parts", 5)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_command_takes_a_budget_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BUDGETS", {"smoke": STEP_TOKENS})
    monkeypatch.setattr(
        "sys.argv", ["train", "--out", str(tmp_path), "--budget", "smoke", "--threads", str(torch.get_num_threads())]
    )
    subject.main()
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "checkpoint.safetensors").is_file()
