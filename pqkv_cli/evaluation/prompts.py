"""Turns what a task wants to ask into token ids, and finds out whether the model can hold it. Knows tokenizers, no tasks."""

from typing import Any

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.models.geometry import num_positions as config_positions
from pqkv_cli.models.prefix import whole_ids

PROMPT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def prompt_lengths(longest: int) -> list[int]:
    """Return the prompt lengths up to `longest` tokens: powers of two from 512 on, and `longest` if it is well beyond the last.

    So `longest` of 8,176, all that 8,192 positions leave room for, is asked at 8,176 and not only at 4,096.
    """
    lengths = [length for length in PROMPT_LENGTHS if length <= longest]
    return lengths if lengths and 2 * longest < 3 * lengths[-1] else [*lengths, longest]


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the ids [T] int64 of a whole prompt: what the model's texts begin with once, and no end token (`whole_ids`)."""
    return torch.tensor(whole_ids(tokenizer, text), dtype=torch.int64)


def num_positions(model: Any) -> int | None:
    """Return how many positions the model has, None where it does not say."""
    return config_positions(model.config) or None


def require_room(
    model: Any, what: str, num_tokens: int, answer_tokens: int, least_tokens: int = 2, parts: str = "needle and question"
) -> None:
    """Refuse prompts that the model cannot hold, or that cannot hold their question, whose `parts` take `least_tokens`.

    Raises
    ------
    DataError
        If prompt and answer exceed the model's positions, or the prompt is too short. What it advises works.
    """
    positions = num_positions(model)
    if positions is not None and num_tokens + answer_tokens > positions:
        raise DataError(
            f"{what} prompts of {num_tokens} tokens and {answer_tokens} tokens of answer exceed the model's "
            f"{positions} positions; {shorter(positions - answer_tokens, least_tokens)}"
        )
    if num_tokens < least_tokens:
        most = None if positions is None else positions - answer_tokens
        raise DataError(
            f"a {what} prompt of {num_tokens} tokens is too short: {parts} take {least_tokens}; {longer(least_tokens, most)}"
        )


def shorter(most: int, least: int) -> str:
    """Return the advice to ask in at most `most` tokens, or where not even the least prompt fits, that nothing helps."""
    if most >= max(least, 2):
        return f"use --context {most} or less" + (f", but at least {least}" if least > 2 else "")
    return (
        f"the shortest takes {least}, so this task cannot run on this model: leave it out, or take a model with more positions"
    )


def longer(least: int, most: int | None) -> str:
    """Return the advice to ask in at least `least` tokens, where the model can hold `most`, with room for text around them."""
    if most is not None and most < least:
        return (
            f"the model can hold {max(most, 0)}, so this task cannot run on it: leave it out, or take one with more positions"
        )
    return f"use --context {2 * least if most is None else min(2 * least, most)} or more"
