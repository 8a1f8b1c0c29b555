import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model.checkpoint import load_checkpoint, save_checkpoint
from tools.demo_model.curriculum import STAGES
from tools.demo_model.tasks import RowMaker
from tools.demo_model.tokenizer import VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog and the value of things is 1234 " * 50])


@pytest.mark.parametrize("kind", ["text", "copy", "passkey", "lookup"])
@pytest.mark.parametrize("length", [256, 512, 2048])
def test_rows_are_whole_and_seeded(tokenizer: Tokenizer, kind: str, length: int) -> None:
    filler = np.random.default_rng(0).integers(3, 200, 10_000)
    maker = RowMaker(tokenizer, filler, 5.0, 8192)
    row, again = (maker.kinds[kind](length, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(row.tokens, again.tokens) and np.array_equal(row.positions, again.positions)
    assert (len(row.tokens), len(row.weights), len(row.positions)) == (length + 1, length, length)
    assert row.tokens[0] == tokenizer.token_to_id("<s>") and row.tokens.max() < VOCAB_SIZE
    assert (np.diff(row.positions) >= 1).all() and row.positions.max() < 8192
    if kind in ("passkey", "lookup"):
        answer = tokenizer.decode(row.tokens[1:][row.weights == 5.0].tolist())
        needles = tokenizer.decode(row.tokens[1:][row.weights == 1.0].tolist())
        digits = [part for part in answer.replace(".", " ").split() if part]
        assert digits and all(part in needles for part in digits)


def test_too_short_a_row_is_refused(tokenizer: Tokenizer) -> None:
    maker = RowMaker(tokenizer, np.arange(3, 2000), 5.0, 8192)
    with pytest.raises(ValueError, match="cannot hold"):
        maker.passkey(20, np.random.default_rng(0))


def test_stages_are_complete() -> None:
    for stage in STAGES:
        assert sum(stage.lengths.values()) == pytest.approx(1) and sum(stage.kinds.values()) == pytest.approx(1)
    assert [stage.until for stage in STAGES] == sorted(stage.until for stage in STAGES) and STAGES[-1].until == 1.0


def test_checkpoints_restore_model_and_optimizer(tmp_path) -> None:
    def make() -> tuple[LlamaForCausalLM, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )
        model = LlamaForCausalLM(config)
        return model, [torch.optim.AdamW(model.parameters(), lr=0.01)]

    def train(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(step))
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    whole = make()
    train(*whole, range(6))
    first = make()
    train(*first, range(3))
    save_checkpoint(tmp_path / "c.safetensors", *first, {"step": 3})
    second = make()
    assert load_checkpoint(tmp_path / "c.safetensors", *second) == {"step": 3}
    train(*second, range(3, 6))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
