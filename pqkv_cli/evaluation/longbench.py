"""LongBench v1: 21 tasks of long reading, asked and scored after the published rules.

Greedy; a prompt longer than the limit loses its middle; chat models are asked through their template except where examples or
code are continued; one score per task, 0 to 100, and their average. Knows the protocol; rows, metrics and facts are elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.generation import Question
from pqkv_cli.evaluation.longbench_data import LongBenchRow, is_longbench_e, load_longbench, tasks_in
from pqkv_cli.evaluation.longbench_metrics import ENDS_WITH_LINE, TASKS, require_packages, score
from pqkv_cli.evaluation.prompts import num_positions, prompt_ids
from pqkv_cli.evaluation.qa_runner import Answers, ask
from pqkv_cli.evaluation.record import TaskOutcome
from pqkv_cli.evaluation.sample_log import Sample
from pqkv_cli.evaluation.scores import compared, compared_samples, grouped, interval95, recovery, scores
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.chat import chat_text, has_chat_template, template_notes
from pqkv_cli.models.prefix import plain_ids
from pqkv_cli.reporter import Advance

_LEAST_PROMPT = 16  # tokens; what is left of a prompt that is cut to fewer asks nothing
_SPARE_TOKENS = 64  # for a chat template, and for prompts that are cut elsewhere
_LENGTHS = ((4000, "0-4k"), (8000, "4-8k"))


def longbench(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Answer LongBench with and without compression; `settings.context` is the longest prompt before the chat template.

    Raises
    ------
    DataError
        If rows or packages are missing, or prompts do not fit the model.
    """
    tasks = tasks_in(subject.data)
    require_packages({TASKS[name].metric for name in tasks})
    rows = {(row.task, row.number): row for row in load_longbench(subject.data, tasks, settings.limit)}
    if subject.data is None:
        subject.asked.extend(row.prompt for row in rows.values())
    asked = _questions(subject, list(rows.values()), settings.context)
    _check_room(subject, list(rows.values()), asked, settings.context)
    # Prompts of a length together, so that batches are hardly padded.
    order = list(TASKS)
    asked.sort(key=lambda q: (q.max_new_tokens, bool(q.stop_ids), len(q.ids), order.index(q.facts["task"]), q.facts["number"]))

    def score_of(question: Question, text: str) -> float:
        row = rows[question.facts["task"], question.facts["number"]]
        return score(TASKS[row.task], text, row.answers, row.all_classes)

    return _outcome(ask(subject, settings, asked, score_of, on_progress), tasks, settings, subject)


def cut_middle(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[tuple[str, bool]]:
    """Return each text, or its first and last ``max_length // 2`` tokens as text, and whether it had more than `max_length`."""
    half = max_length // 2
    cut = []
    # All at once: tokenizers share a list among processors.
    for text, ids in zip(texts, tokenizer(list(texts), truncation=False, verbose=False)["input_ids"], strict=True):
        ends = (ids[:half], ids[-half:])
        is_long = len(ids) > max_length
        kept = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in ends) if is_long else text
        cut.append((kept, is_long))
    return cut


def _questions(subject: Subject, rows: Sequence[LongBenchRow], max_length: int) -> list[Question]:
    cut = cut_middle(subject.tokenizer, [row.prompt for row in rows], max_length)
    return [_question(subject, row, *kept) for row, kept in zip(rows, cut, strict=True)]


def _question(subject: Subject, row: LongBenchRow, text: str, was_cut: bool) -> Question:
    tokenizer, task = subject.tokenizer, TASKS[row.task]
    if task.takes_chat and has_chat_template(tokenizer):
        text = chat_text(tokenizer, text)
    ids: torch.Tensor = prompt_ids(tokenizer, text)
    if not len(ids):
        raise DataError(
            f"{row.task}/{row.number} is asked in no tokens; expected a prompt that the tokenizer knows: remove the row"
        )
    facts = {"task": row.task, "number": row.number, "cut": was_cut, "length": row.length}
    name = f"{row.task}/{row.number}"
    if row.task not in ENDS_WITH_LINE:
        return Question(name, ids, task.max_new_tokens, facts)
    return Question(name, ids, task.max_new_tokens, facts, (plain_ids(tokenizer, "\n")[-1],), 1)


def _check_room(subject: Subject, rows: Sequence[LongBenchRow], asked: Sequence[Question], max_length: int) -> None:
    """Refuse prompts that the model cannot hold with their answers; what the message advises has been tried."""
    positions = num_positions(subject.model)
    worst = max(asked, key=_asked_tokens)
    if positions is None or _asked_tokens(worst) <= positions:
        return
    if cannot := sorted({q.facts["task"] for q in asked if q.max_new_tokens + _LEAST_PROMPT > positions}):
        way = f"this model cannot be asked {', '.join(cannot)}: leave their rows out, or take one with more positions"
    else:
        room = positions - worst.max_new_tokens
        context = min(max_length, room - (_SPARE_TOKENS if room > 2 * _SPARE_TOKENS else 0))
        while context >= _LEAST_PROMPT and (over := _excess(subject, rows, context, positions)) > 0:
            context -= over
        way = f"use --context {context} or less"
        if context < _LEAST_PROMPT:
            way = "this model cannot be asked LongBench: leave the task out, or take one with more positions"
    raise DataError(
        f"{worst.name}, cut to {max_length} tokens, is asked in {len(worst.ids)} and answered in {worst.max_new_tokens}: "
        f"more than the model's {positions} positions; {way}"
    )


def _asked_tokens(question: Question) -> int:
    return len(question.ids) + question.max_new_tokens


def _excess(subject: Subject, rows: Sequence[LongBenchRow], context: int, positions: int) -> int:
    """Return by how many tokens the largest prompt, cut to `context` tokens, and its answer exceed `positions`."""
    return max(map(_asked_tokens, _questions(subject, rows, context))) - positions


def _outcome(answers: Answers, tasks: Sequence[str], settings: EvaluationSettings, subject: Subject) -> TaskOutcome:
    by_task = grouped(answers.scored, lambda s: s["facts"]["task"])
    metrics: dict[str, Any] = {"average": _average(list(by_task.values()), settings.seed)}
    for name in tasks:
        if name in by_task:
            own = compared_samples(by_task[name], settings.seed, 100.0)
            metrics[name] = _rounded(own) | {"samples": len(by_task[name]), "category": TASKS[name].category}
    known = [s for s in answers.scored if s["facts"]["length"] is not None]
    for bucket, own_samples in grouped(known, _bucket).items():
        metrics[f"samples@{bucket}"] = _rounded(compared(*(100 * side for side in scores(own_samples))))
    notes = {
        "prompts_cut_in_the_middle": sum(s["facts"]["cut"] for s in answers.samples),
        "longest_prompt": settings.context,
        **template_notes(subject.tokenizer),
        **({"longbench_e": True} if is_longbench_e(subject.data) else {}),
        "tasks": len(by_task),
    }
    num_tokens = sum(s["num_tokens"] for s in answers.samples)
    return TaskOutcome(metrics, answers.bits, num_tokens, answers.cost, ("average",), answers.failed, notes)


def _average(groups: Sequence[Sequence[Sample]], seed: int) -> dict[str, Any]:
    """Return the mean of the task scores; the interval draws samples that weigh as much as their task lets them."""
    both = [scores(group) for group in groups]
    if not both:
        return compared(np.zeros(0), np.zeros(0))
    means = [np.array([pair[side].mean() for pair in both]) for side in (0, 1)]
    weights = np.concatenate([np.full(len(own), 1 / len(own)) for own, _ in both])
    weighted = [weights * np.concatenate([pair[side] for pair in both]) for side in (0, 1)]

    return _rounded({**compared(100 * means[0], 100 * means[1]), "ci95": interval95(recovery, weighted[0], weighted[1], seed)})


def _bucket(sample: Sample) -> str:
    return next((name for limit, name in _LENGTHS if sample["facts"]["length"] < limit), "8k+")


def _rounded(metric: dict[str, Any]) -> dict[str, Any]:
    """Return `metric` with scores of two digits, as LongBench gives them; recovery and interval are those of full ones."""
    means = {side: round(metric[side], 2) for side in ("baseline", "quantized") if metric[side] is not None}
    return {**metric, **means}
