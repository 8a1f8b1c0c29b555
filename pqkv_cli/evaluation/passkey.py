"""The pass key task: one number hidden in held-out text, asked for at the end, by prompt length and depth."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.calibration.text import added_bos
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.bits import cache_bits, codec_bits
from pqkv_cli.evaluation.bootstrap import Floats, interval95
from pqkv_cli.evaluation.contender import contender
from pqkv_cli.evaluation.outcome import BitsPerChannel, TaskOutcome
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject

PASSKEY_DIGITS = 5
ANSWER_TOKENS = PASSKEY_DIGITS + 2  # a space, and digits one by one: a tokenizer may merge those of one key and not of another
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_PROMPTS_PER_CELL = 5
_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [T] int64, the expected digits, and the depth of the needle (0 first, 1 last)."""

    ids: torch.Tensor
    key: str
    depth: float


def passkey_texts(key: str) -> tuple[str, str, str]:
    """Return the needle, the question and the expected answer for `key` (after Mohtashami and Jaggi 2023)."""
    needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return needle, "\nWhat is the pass key? The pass key is", f" {key}"


def prompt_lengths(longest: int) -> list[int]:
    """Return the prompt lengths up to `longest` tokens: powers of two from 512 on, or `longest` alone where it is shorter."""
    lengths = [length for length in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072) if length <= longest]
    return lengths or [longest]


@torch.no_grad()
def passkey(subject: Subject, settings: EvaluationSettings, on_progress: Callable[[int, int], None]) -> TaskOutcome:
    """Ask for pass keys with and without compression, greedily, and compare.

    Raises
    ------
    DataError
        If the prompts do not fit the text or the model.
    """
    lengths = prompt_lengths(settings.context)
    per_cell = DEFAULT_PROMPTS_PER_CELL if settings.limit is None else settings.limit
    cells: list[dict[str, Any]] = []
    scores: tuple[list[float], list[float]] = ([], [])
    seconds = {"baseline": 0.0, "quantized": 0.0}
    bits = codec_bits(subject.artifact)
    with contender(subject, settings.mode) as new_cache:
        for index, length in enumerate(lengths):
            prompts = make_prompts(subject, length, per_cell, settings.seed)
            size = max(1, _BATCH_TOKENS // length)
            found: tuple[list[bool], list[bool]] = ([], [])
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                began = time.perf_counter()
                found[0].extend(_answers_right(subject, batch, None))
                between = time.perf_counter()
                cache = new_cache()
                found[1].extend(_answers_right(subject, batch, cache))
                seconds["baseline"] += between - began
                seconds["quantized"] += time.perf_counter() - between
                bits = cache_bits(cache) if isinstance(cache, QuantizedCache) else bits
            for side in (0, 1):
                scores[side].extend(map(float, found[side]))
            cells += _cells(length, prompts, *found)
            on_progress(index + 1, len(lengths))
    return _outcome(cells, scores, bits, seconds, settings)


def make_prompts(subject: Subject, length: int, per_cell: int, seed: int) -> list[Prompt]:
    """Return `per_cell` prompts of exactly `length` tokens for every depth.

    Raises
    ------
    DataError
        If `length` leaves no room for the needle, exceeds the model's positions, or the text is too short.
    """
    positions = subject.model.config.max_position_embeddings
    if length + ANSWER_TOKENS > positions:
        raise DataError(
            f"pass key prompts of {length} tokens and {ANSWER_TOKENS} tokens of answer exceed the model's "
            f"{positions} positions; use --context {positions - ANSWER_TOKENS} or less"
        )
    filler = torch.tensor(_ids(subject.tokenizer, subject.text), dtype=torch.int64)
    rng = np.random.default_rng([seed, length])
    return [_make_prompt(subject.tokenizer, filler, length, depth, rng) for depth in DEPTHS for _ in range(per_cell)]


def _make_prompt(tokenizer: Any, filler: torch.Tensor, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    key = "".join(str(digit) for digit in rng.integers(0, 10, PASSKEY_DIGITS))
    needle, question, _ = (torch.tensor(_ids(tokenizer, text), dtype=torch.int64) for text in passkey_texts(key))
    start = torch.tensor(added_bos(tokenizer), dtype=torch.int64)
    room = length - len(start) - len(needle) - len(question)
    if room < 0:
        raise DataError(
            f"a pass key prompt of {length} tokens is too short: needle and question take {length - room}; "
            f"use --context {2 * (length - room)} or more"
        )
    if room >= len(filler):
        raise DataError(
            f"a pass key prompt of {length} tokens needs {room} tokens of text beside its question; the text has "
            f"{len(filler)}: choose a smaller --context or give more text"
        )
    offset = int(rng.integers(0, len(filler) - room))
    text, cut = filler[offset : offset + room], round(depth * room)
    return Prompt(torch.cat((start, text[:cut], needle, text[cut:], question)), key, depth)


def _answers_right(subject: Subject, prompts: list[Prompt], cache: Any) -> list[bool]:
    model, tokenizer = subject.model, subject.tokenizer
    ids = torch.stack([prompt.ids for prompt in prompts]).to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().startswith(prompt.key) for text, prompt in zip(texts, prompts, strict=True)]


def _cells(length: int, prompts: list[Prompt], baseline: list[bool], quantized: list[bool]) -> list[dict[str, Any]]:
    cells = []
    for depth in DEPTHS:
        rows = [i for i, prompt in enumerate(prompts) if prompt.depth == depth]
        mean = {
            name: float(np.mean([side[i] for i in rows])) for name, side in (("baseline", baseline), ("quantized", quantized))
        }
        cells.append({"length": length, "depth": depth, "samples": len(rows), **mean})
    return cells


def _outcome(
    cells: list[dict[str, Any]],
    scores: tuple[list[float], list[float]],
    bits: BitsPerChannel,
    seconds: dict[str, float],
    settings: EvaluationSettings,
) -> TaskOutcome:
    baseline, quantized = (np.array(side) for side in scores)

    def recovery(a: Floats, b: Floats) -> float:
        return float(b.mean() / a.mean()) if a.mean() else float("nan")

    metrics: dict[str, Any] = {"accuracy": _compared(baseline, quantized)}
    metrics["accuracy"]["ci95"] = interval95(recovery, baseline, quantized, settings.seed)
    for length in sorted({cell["length"] for cell in cells}):
        rows = [cell for cell in cells if cell["length"] == length]
        sides = (np.array([cell[name] for cell in rows]) for name in ("baseline", "quantized"))
        metrics[f"accuracy@{length}"] = _compared(*sides)
    metrics["grid"] = cells
    return TaskOutcome(metrics, bits, sum(cell["samples"] * cell["length"] for cell in cells), {"seconds": seconds})


def _compared(baseline: Floats, quantized: Floats) -> dict[str, Any]:
    a, b = float(baseline.mean()), float(quantized.mean())
    return {"baseline": a, "quantized": b, "recovery": b / a if a else None}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
