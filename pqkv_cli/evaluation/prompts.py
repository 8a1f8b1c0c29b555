"""Turns what a task wants to ask into token ids, as the model at hand wants to be asked. Knows tokenizers, no tasks."""

from typing import Any

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.prefix import whole_ids

PROMPT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def prompt_lengths(longest: int) -> list[int]:
    """Return the prompt lengths up to `longest` tokens: powers of two from 512 on, or `longest` alone where it is shorter."""
    lengths = [length for length in PROMPT_LENGTHS if length <= longest]
    return lengths or [longest]


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer knows how its model wants to be talked to."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Any, message: str) -> str:
    """Return `message` as a user's turn, ready for the answer."""
    turns = [{"role": "user", "content": message}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the ids [T] int64 of a whole prompt: what the model's texts begin with once, and no end token (`whole_ids`)."""
    return torch.tensor(whole_ids(tokenizer, text), dtype=torch.int64)


def num_positions(model: Any) -> int | None:
    """Return how many positions the model has, None where it does not say."""
    return geometry(model.config).max_positions or None


def require_room(model: Any, what: str, num_tokens: int, answer_tokens: int) -> None:
    """Refuse prompts that the model cannot hold.

    Raises
    ------
    DataError
        If prompt and answer exceed the model's positions.
    """
    positions = num_positions(model)
    if positions is not None and num_tokens + answer_tokens > positions:
        raise DataError(
            f"{what} prompts of {num_tokens} tokens and {answer_tokens} tokens of answer exceed the model's "
            f"{positions} positions; use --context {positions - answer_tokens} or less"
        )
