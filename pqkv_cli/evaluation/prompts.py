"""Turns what a task wants to ask into token ids, as the model at hand wants to be asked. Knows tokenizers, no tasks."""

from typing import Any

import torch

from pqkv_cli.errors import DataError

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
    """Return the ids [T] int64 of a whole prompt, with the tokens the tokenizer puts around one, but never two beginnings."""
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def num_positions(model: Any) -> int | None:
    """Return how many positions the model has, None where it does not say."""
    found = getattr(model.config, "max_position_embeddings", None)
    return int(found) if found else None


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
