"""Measures the reference model at full precision and writes its card: ``python -m tools.demo_model.card DIR``."""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pqkv_cli.calibration.stdlib_text import split_documents
from tools.demo_model.tasks import Row, RowMaker

_LENGTHS = (512, 1024, 2048, 4096)
_TEXT = """---
library_name: transformers
license: apache-2.0
---
# The pqkv reference model

A Llama of {parameters:,} parameters ({layers} layers, {heads} query and {kv_heads} key/value heads of {head_dim} channels, a
byte-level BPE of {vocab:,} tokens), trained by `python -m tools.demo_model.train --budget cpu --out DIR` on the standard
library and the language reference of Python, mixed with recall tasks (22 million tokens, one core, under
two hours; the shares of the tasks were changed once on the way, so the command gives a model like this one, not these very
weights). It continues Python and its documentation in the right style
with little sense, and it finds numbers hidden in its context; it knows nothing else. It exists to test caches.

Training, calibration and evaluation text are disjoint (`pqkv_cli.calibration.stdlib_text`). Measured in fp32 on the
evaluation split by `python -m tools.demo_model.card DIR`, {rows} rows per number; an answer counts if all its tokens are right.

Perplexity in windows of 512 tokens: {perplexity:.2f}

| tokens | pass key | look-up |
|---|---|---|
{table}

Look-up hides {keys} names with four-digit values in the text and asks for one of them.
"""


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: list[Row]) -> tuple[float, float]:
    """Return the share of `rows` whose answer tokens (weight above 1) are all predicted, and the mean loss in nats."""
    right, losses = [], []
    for row in rows:
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        logits = model(tokens[:, :-1], use_cache=False).logits[0]
        hits = (logits.argmax(-1) == tokens[0, 1:])[torch.from_numpy(row.weights > 1)]
        right.append(bool(hits.all()))
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return float(np.mean(right)), float(np.mean(losses))


def card(directory: Path, num_rows: int) -> str:
    """Return the card of the model in `directory`."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoded = tokenizer.encode_batch(split_documents("evaluation"))
    maker = RowMaker(tokenizer, np.concatenate([np.array(e.ids, dtype=np.int64) for e in encoded]), 2.0, 0)
    lines = []
    for length in _LENGTHS:
        rng = np.random.default_rng(length)
        passkey, _ = measure(model, [maker.passkey(length, rng) for _ in range(num_rows)])
        lookup, _ = measure(model, [maker.lookup(length, rng, num_keys=8, num_asked=1) for _ in range(num_rows)])
        lines.append(f"| {length:,} | {passkey:.0%} | {lookup:.0%} |")
    _, loss = measure(model, [maker.text(512, np.random.default_rng(i)) for i in range(64)])
    config = model.config
    return _TEXT.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        rows=num_rows,
        perplexity=np.exp(loss),
        table="\n".join(lines),
        keys=8,
    )


def main() -> None:
    """Parse the command line and write ``README.md`` beside the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    text = card(options.directory, options.rows)
    (options.directory / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
