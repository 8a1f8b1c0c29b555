"""The needle in a haystack: one sentence in held-out text, asked for at the end, by prompt length and depth.

Sentence, question and insertion at the end of a sentence are those of Kamradt's test; the cue that a plain language model
completes is that of its common variant. The score is the share of the sentence's words that the answer repeats, so it says how
much is recalled, not only whether.
"""

import re
from collections import Counter
from typing import Any

import numpy as np
import torch

from pqkv_cli.evaluation.generation import Question
from pqkv_cli.evaluation.passkey import filler_slice, grid_outcome
from pqkv_cli.evaluation.prompts import prompt_lengths, require_room
from pqkv_cli.evaluation.qa_runner import ask
from pqkv_cli.evaluation.record import TaskOutcome
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.prefix import plain_ids, prefix_ids
from pqkv_cli.reporter import Advance

NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
CUE = (
    "\nBased on the content of the text, question: What is the best thing to do in San Francisco?"
    "\nAnswer: The best thing to do in San Francisco is"
)
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
DEPTHS = tuple(i / 10 for i in range(11))
_SPARE_TOKENS = 4


def needle(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Ask for the needle with and without compression, greedily, at eleven depths of every length.

    Raises
    ------
    DataError
        If the prompts do not fit the text or the model.
    """
    budget = len(plain_ids(subject.tokenizer, " " + ANSWER)) + _SPARE_TOKENS
    least = len(prefix_ids(subject.tokenizer)) + sum(len(plain_ids(subject.tokenizer, text)) for text in (NEEDLE, CUE))
    questions = []
    for length in prompt_lengths(settings.context):
        require_room(subject.model, "needle", length, budget, least)
        rng = np.random.default_rng([settings.seed, length])
        for depth in DEPTHS:
            for i in range(settings.limit or 1):
                ids = needle_prompt(subject.tokenizer, subject.text, length, depth, rng)
                questions.append(Question(f"{length}/{depth}/{i}", ids, budget, {"length": length, "depth": depth}))
    answers = ask(subject, settings, questions, lambda question, text: recalled(text), on_progress)
    return grid_outcome(answers, settings, "recall")


def needle_prompt(tokenizer: Any, haystack: str, length: int, depth: float, rng: np.random.Generator) -> torch.Tensor:
    """Return a prompt [length] int64 with the needle behind the last full stop before `depth` (0 first, 1 last).

    Raises
    ------
    DataError
        If there is no room for the needle, or the haystack is too short.
    """
    filler = torch.tensor(plain_ids(tokenizer, haystack), dtype=torch.int64)
    start, hidden, question = (
        torch.tensor(ids, dtype=torch.int64)
        for ids in (prefix_ids(tokenizer), plain_ids(tokenizer, NEEDLE), plain_ids(tokenizer, CUE))
    )
    text = filler_slice(filler, length - len(start) - len(hidden) - len(question), length, "needle", rng)
    cut = len(text) if depth == 1 else _sentence_end(tokenizer, text, int(depth * len(text)))
    return torch.cat((start, text[:cut], hidden, text[cut:], question))


def recalled(answer: str) -> float:
    """Return the share of the needle's words that `answer` holds, each as often as it occurs there."""
    wanted, found = Counter(_words(ANSWER)), Counter(_words(answer))
    return (wanted & found).total() / wanted.total()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sentence_end(tokenizer: Any, text: torch.Tensor, cut: int) -> int:
    tokens = text.tolist()
    while cut > 0 and not tokenizer.decode(tokens[cut - 1]).rstrip().endswith("."):
        cut -= 1
    return cut
