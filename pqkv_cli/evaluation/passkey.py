"""The pass key task: one number hidden in held-out text, asked for at the end, by prompt length and depth."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.generation import Question
from pqkv_cli.evaluation.prompts import prompt_lengths, require_room
from pqkv_cli.evaluation.qa_runner import Answers, ask
from pqkv_cli.evaluation.record import TaskOutcome
from pqkv_cli.evaluation.scores import compared, compared_samples, grid, grouped, scores
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.prefix import plain_ids, prefix_ids
from pqkv_cli.reporter import Advance

PASSKEY_DIGITS = 5
ANSWER_TOKENS = PASSKEY_DIGITS + 2  # a space, and digits one by one: a tokenizer may merge those of one key and not of another
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_PROMPTS_PER_CELL = 5
_SPARE_TOKENS = 8  # by which prompts with other keys may differ


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


def passkey(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Ask for pass keys with and without compression, greedily, and compare.

    Raises
    ------
    DataError
        If the prompts do not fit the text or the model.
    """
    per_cell = DEFAULT_PROMPTS_PER_CELL if settings.limit is None else settings.limit
    questions = [
        Question(f"{length}/{i}", prompt.ids, ANSWER_TOKENS, {"length": length, "depth": prompt.depth, "key": prompt.key})
        for length in prompt_lengths(settings.context)
        for i, prompt in enumerate(make_prompts(subject, length, per_cell, settings.seed))
    ]
    answers = ask(subject, settings, questions, _is_right, on_progress)
    return grid_outcome(answers, settings)


def _is_right(question: Question, text: str) -> float:
    return float(text.strip().startswith(question.facts["key"]))


def make_prompts(subject: Subject, length: int, per_cell: int, seed: int) -> list[Prompt]:
    """Return `per_cell` prompts of exactly `length` tokens for every depth.

    Raises
    ------
    DataError
        If `length` leaves no room for the needle, exceeds the model's positions, or the text is too short.
    """
    require_room(subject.model, "pass key", length, ANSWER_TOKENS, _least_tokens(subject.tokenizer))
    filler = torch.tensor(plain_ids(subject.tokenizer, subject.text), dtype=torch.int64)
    rng = np.random.default_rng([seed, length])
    return [_make_prompt(subject.tokenizer, filler, length, depth, rng) for depth in DEPTHS for _ in range(per_cell)]


def _least_tokens(tokenizer: Any) -> int:
    """Return the tokens of a prompt without text around its needle; some keys take fewer."""
    texts = [passkey_texts(key)[:2] for key in ("00000", "12345", "98765")]
    return len(prefix_ids(tokenizer)) + max(sum(len(plain_ids(tokenizer, text)) for text in own) for own in texts)


def _make_prompt(tokenizer: Any, filler: torch.Tensor, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    key = "".join(str(digit) for digit in rng.integers(0, 10, PASSKEY_DIGITS))
    needle, question, _ = (torch.tensor(plain_ids(tokenizer, text), dtype=torch.int64) for text in passkey_texts(key))
    start = torch.tensor(prefix_ids(tokenizer), dtype=torch.int64)
    room = length - len(start) - len(needle) - len(question)
    text = filler_slice(filler, room, length, "pass key", rng)
    cut = round(depth * room)
    return Prompt(torch.cat((start, text[:cut], needle, text[cut:], question)), key, depth)


def filler_slice(filler: torch.Tensor, room: int, length: int, what: str, rng: np.random.Generator) -> torch.Tensor:
    """Return `room` consecutive tokens of `filler` for a prompt of `length` tokens.

    Raises
    ------
    DataError
        If there is no room, or the text is too short.
    """
    if room < 0:
        raise DataError(
            f"a {what} prompt of {length} tokens is too short: needle and question take {length - room}; "
            f"use --context {2 * (length - room)} or more"
        )
    if room >= len(filler):
        most = length - room + len(filler) - 1 - _SPARE_TOKENS
        smaller = f"choose a smaller --context ({most} or less) or " if most > length - room else ""
        raise DataError(
            f"a {what} prompt of {length} tokens needs {room} tokens of text beside its question; the text has "
            f"{len(filler)}: {smaller}give more text"
        )
    offset = int(rng.integers(0, len(filler) - room))
    return filler[offset : offset + room]


def grid_outcome(answers: Answers, settings: EvaluationSettings, name: str = "accuracy") -> TaskOutcome:
    """Return the metric `name` overall, by prompt length, and as a grid over length and depth."""
    metrics: dict[str, Any] = {name: compared_samples(answers.scored, settings.seed)}
    for length, own in grouped(answers.scored, lambda s: s["facts"]["length"]).items():
        metrics[f"{name}@{length}"] = compared(*scores(own))
    metrics["grid"] = grid(answers.scored)
    num_tokens = sum(sample["num_tokens"] for sample in answers.samples)
    return TaskOutcome(metrics, answers.bits, num_tokens, answers.cost, (name,), answers.failed)
