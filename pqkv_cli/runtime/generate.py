"""Generates text over a quantized cache. Knows tokens and caches, prints nothing."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch

from pqkv_cli.cache.cache import CacheBytes
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.prefix import whole_ids
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.decoding import SPECIAL_TOKENS, TEXT_SETTINGS, own_settings
from pqkv_cli.runtime.step_graph import GraphChoice, GraphRequest, choose_graph, step_graph
from pqkv_cli.runtime.texts import TextPieces, added_text


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """How to generate; `temperature` 0 is greedy, `graph` says whether decode steps are captured (`choose_graph`).

    Raises
    ------
    UsageError
        If a field is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    graph: GraphRequest = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if self.graph not in get_args(GraphRequest):
            raise UsageError(f"graph is {self.graph!r}; expected one of {', '.join(get_args(GraphRequest))}")


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation, with the bytes of the cache that carried it and of an uncompressed one of the same tokens.

    `graph` says whether its steps were replayed from a CUDA graph, and why.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    cache_bytes: CacheBytes
    baseline_bytes: int
    graph: GraphChoice


def generate(
    attached: Attached,
    tokenizer: Any,
    prompt: str,
    settings: GenerateSettings,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`; `on_text` receives the new text piece by piece as it comes.

    The text is what the new tokens add to that of the prompt, its first space included. Of the checkpoint's own generation
    settings those count that shape the text (`TEXT_SETTINGS`), and its special tokens.

    Raises
    ------
    DataError
        If the prompt has no tokens or leaves no room in the model's positions.
    CacheError
        If a captured step was asked for and cannot be.
    """
    model = attached.model
    ids = torch.tensor([whole_ids(tokenizer, prompt)], dtype=torch.int64, device=model.device)
    _check_room(model, ids.shape[1], settings.max_new_tokens)
    cache = attached.new_cache()
    choice = choose_graph(settings.graph, attached, cache)
    torch.manual_seed(settings.seed)
    sampling = {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    captured = step_graph(attached, cache) if choice.used else nullcontext()
    with own_settings(model, SPECIAL_TOKENS | TEXT_SETTINGS), captured:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(model, cache),
            use_cache=True,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=padding,
            streamer=None if on_text is None else TextPieces(tokenizer, on_text),
            **sampling,
        )
    new = output[0, ids.shape[1] :].tolist()
    return Generation(
        text=added_text(tokenizer, ids[0].tolist(), new),
        num_prompt_tokens=ids.shape[1],
        num_new_tokens=len(new),
        cache_bytes=cache.num_bytes(),
        baseline_bytes=_baseline_bytes(cache, model.dtype.itemsize),
        graph=choice,
    )


def _check_room(model: Any, num_tokens: int, num_new: int) -> None:
    max_positions = geometry(model.config).max_positions or sys.maxsize
    if num_tokens == 0:
        raise DataError("the prompt has no tokens; give at least one word")
    if max_positions - num_tokens < num_new:
        room = max_positions - num_tokens
        way = f"shorten the prompt or ask for at most {room}"
        if room <= 0:
            way = f"that leaves room for at most 0, so shorten the prompt to {max(1, max_positions - num_new)} tokens"
            way += "" if max_positions > num_new else f" and ask for at most {max_positions - 1}"
        raise DataError(
            f"the prompt has {num_tokens} tokens and {num_new} more are asked for; the model has "
            f"{max_positions} positions: {way}"
        )


def _baseline_bytes(cache: Any, element_bytes: int) -> int:
    quantized = sum(
        sum(window.shape[0] * window.shape[1] * window.shape[3] for window in layer.window.values()) * layer.get_seq_length()
        for layer in cache.quantized_layers
    )
    return int(quantized * element_bytes + cache.num_bytes().dense)
