"""Text sampled from a model itself, its in-distribution text: ``python -m tools.demo_model.sample MODEL OUT --seed 0``."""

import argparse
from pathlib import Path

import torch

from pqkv_cli.files import write_text
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model


@torch.no_grad()
def sample_text(model_directory: str, num_windows: int, seed: int) -> str:
    """Return `num_windows` samples at temperature 1 from BOS to the model's last position, separated by blank lines."""
    model, tokenizer = load_model(resolve_model(model_directory), torch.float32, "cpu")
    torch.manual_seed(seed)
    num_new = model.config.max_position_embeddings - 1
    start = torch.full((num_windows, 1), tokenizer.bos_token_id)
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    return "\n\n".join(tokenizer.batch_decode(output, skip_special_tokens=True))


def main() -> None:
    """Parse the command line and write the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_text(options.out, sample_text(options.model, options.windows, options.seed) + "\n")


if __name__ == "__main__":
    main()
