"""Trains the reference model: ``python -m tools.demo_model.train --budget cpu --out DIR``.

Seeded and resumable: batches depend on the seed and the step alone, a checkpoint is written every five minutes, and the
same command goes on where the last one stopped. Uses a GPU where there is one, else as many threads as `--threads` says.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AttentionInterface, LlamaForCausalLM

from pqkv_cli.calibration.stdlib_text import split_documents
from tools.demo_model.architecture import MAX_POSITIONS, reference_config
from tools.demo_model.checkpoint import load_checkpoint, save_checkpoint
from tools.demo_model.curriculum import BUDGETS, STAGES, Stage
from tools.demo_model.tasks import Row, RowMaker
from tools.demo_model.tokenizer import save_tokenizer, train_tokenizer

_CHECKPOINT_SECONDS = 300
_PROBE_STEPS = 100
_PROBE_ROWS = 40


@dataclass(slots=True)
class Progress:
    """Where training stands."""

    step: int = 0
    stage: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One training run in one directory."""

    def __init__(self, out: Path, num_tokens: int, seed: int, learning_rate: float) -> None:
        self.out, self.num_tokens, self.seed, self.learning_rate = out, num_tokens, seed, learning_rate
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        out.mkdir(parents=True, exist_ok=True)
        documents = split_documents("train")
        self.tokenizer = self._tokenizer(documents)
        self.filler = self._token_stream(documents)
        self.held_out = self._token_stream(split_documents("calibration"))
        torch.manual_seed(seed)
        AttentionInterface.register("causal", _causal_attention)
        self.model = LlamaForCausalLM._from_config(reference_config(), attn_implementation="causal").to(self.device)
        self.model_loss = torch.compile(self._model_loss, dynamic=False)
        self.optimizers = self._optimizers()
        self.progress = Progress()
        if (out / "checkpoint.safetensors").exists():
            self.progress = Progress(**load_checkpoint(out / "checkpoint.safetensors", self.model, self.optimizers))

    def run(self) -> None:
        """Train to the end of the budget and write the model."""
        started = saved = time.monotonic()
        spent = self.progress.seconds
        losses: list[float] = []
        while self.progress.num_tokens < self.num_tokens:
            stage = STAGES[self.progress.stage]
            losses.append(self._step(stage))
            self.progress.seconds = spent + time.monotonic() - started
            if self.progress.step % _PROBE_STEPS == 0:
                self._advance(stage, float(np.mean(losses)))
                losses.clear()
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                saved = time.monotonic()
                self._save_checkpoint()
        self._save_checkpoint()
        self._export()

    def _step(self, stage: Stage) -> float:
        rng = np.random.default_rng([self.seed, self.progress.step])
        length = int(rng.choice(list(stage.lengths), p=list(stage.lengths.values())))
        num_rows = max(1, stage.tokens_per_step // length)
        maker = RowMaker(self.tokenizer, self.filler, stage.answer_weight, stage.max_position)
        kinds = rng.choice(list(stage.kinds), num_rows, p=list(stage.kinds.values()))
        rows = [maker.kinds[kind](length, rng) for kind in kinds]
        share = self.progress.num_tokens / self.num_tokens
        scale = min(1.0, (self.progress.step + 1) / 50)
        if stage.decays:
            start = STAGES[self.progress.stage - 1].until
            scale *= max(0.0, (1 - share) / (1 - start))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        loss = self.model_loss(*self._batch(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.num_tokens += num_rows * length
        return float(loss.detach())

    def _batch(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
        positions = torch.from_numpy(np.stack([row.positions for row in rows]).astype(np.int64))
        weights = torch.from_numpy(np.stack([row.weights for row in rows])).float()
        return tokens.to(self.device), positions.to(self.device), weights.to(self.device)

    def _model_loss(self, tokens: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = self._logits(tokens, positions)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits: torch.Tensor = self.model(tokens[:, :-1], position_ids=positions, use_cache=False).logits
        return logits

    @torch.no_grad()
    def probe(self, kind: str, length: int) -> float:
        """Return the share of held-out rows whose answer tokens are all predicted right, teacher-forced."""
        maker = RowMaker(self.tokenizer, self.held_out, 2.0, 0)
        rng = np.random.default_rng([self.seed, length])
        right = []
        for _ in range(_PROBE_ROWS):
            row = maker.kinds[kind](length, rng)
            tokens, positions, weights = self._batch([row])
            hits = self._logits(tokens, positions).argmax(-1) == tokens[:, 1:]
            right.append(bool(hits[weights > 1].all()))
        return float(np.mean(right))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean cross-entropy (nats per token) on fixed held-out windows of 512 tokens."""
        maker = RowMaker(self.tokenizer, self.held_out, 1.0, 0)
        rng = np.random.default_rng(self.seed)
        return float(np.mean([float(self._model_loss(*self._batch([maker.text(512, rng)]))) for _ in range(32)]))

    def _advance(self, stage: Stage, train_loss: float) -> None:
        reached = {f"{g.kind}@{g.length}": self.probe(g.kind, g.length) for g in stage.goals}
        met = bool(stage.goals) and all(reached[f"{g.kind}@{g.length}"] >= g.accuracy for g in stage.goals)
        record = asdict(self.progress) | {"stage": stage.name, "train_loss": train_loss, **reached}
        if self.progress.step % (5 * _PROBE_STEPS) == 0:
            record |= {"held_out_loss": self.held_out_loss(), "passkey@4096": self.probe("passkey", 4096)}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        if met or self.progress.num_tokens >= stage.until * self.num_tokens:
            self.progress.stage = min(self.progress.stage + 1, len(STAGES) - 1)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        named = dict(self.model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        rate = self.learning_rate
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = rate
        return optimizers

    def _tokenizer(self, documents: list[str]) -> Tokenizer:
        if not (self.out / "tokenizer.json").exists():
            save_tokenizer(train_tokenizer(documents), self.out, MAX_POSITIONS)
        return Tokenizer.from_file(str(self.out / "tokenizer.json"))

    def _token_stream(self, documents: list[str]) -> np.ndarray:
        encoded = self.tokenizer.encode_batch(documents, add_special_tokens=True)
        return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded]).astype(np.int64)

    def _save_checkpoint(self) -> None:
        save_checkpoint(self.out / "checkpoint.safetensors", self.model, self.optimizers, asdict(self.progress))

    def _export(self) -> None:
        self.model.set_attn_implementation("sdpa")
        self.model.to(torch.float16).save_pretrained(self.out)


def _causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention that reads no mask: transformers would take position gaps for packed sequences."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2), None


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; continued where it exists")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu", help="token budget by machine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer(options.out, BUDGETS[options.budget], options.seed, options.learning_rate).run()


if __name__ == "__main__":
    main()
