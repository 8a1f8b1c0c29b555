"""The task `lines`: a list of named lines in held-out text, one of which is asked for (LongEval)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.generation import Question
from pqkv_cli.evaluation.prompts import num_positions, prompt_ids, prompt_lengths, require_room
from pqkv_cli.evaluation.qa_runner import ask
from pqkv_cli.evaluation.record import TaskOutcome
from pqkv_cli.evaluation.rows import Row, checked_text, read_rows, shown
from pqkv_cli.evaluation.scores import compared, compared_samples, grouped, scores
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.chat import chat_text, has_chat_template, template_notes
from pqkv_cli.models.prefix import plain_ids
from pqkv_cli.reporter import Advance

_ADJECTIVES = (
    "able amber ancient ashen bald bitter blank bold brave brisk broad calm civil clean clever cold crisp curly daring dear "
    "dry dusty eager early elder empty even exact faint fair false fancy fast fierce final firm flat fluffy fond free fresh "
    "frosty gentle giant glad golden grand great green happy harsh hasty heavy hollow honest hot huge humble hungry icy idle"
).split()
_NOUNS = (
    "acorn anchor apple arrow badge barn basin beach bell bench berry blade boat bonnet book boot bottle bowl brick bridge "
    "brush bucket button cabin camel candle canoe carpet castle cave chain chair cherry circle cliff cloud coat coin comb "
    "coral cottage crane dagger desk diamond dish dock door dragon drum eagle engine falcon feather fence ferry field"
).split()


def line_names(count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` different names in random order; beyond the pairs that there are, numbered ones."""
    size = len(_ADJECTIVES) * len(_NOUNS)
    chosen = np.concatenate([rng.permutation(size) + turn * size for turn in range(count // size + 1)])[:count]
    return [_name(int(index), size) for index in chosen]


def _name(index: int, size: int) -> str:
    turn, index = divmod(index, size)
    name = f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}"
    return f"{name}-{turn + 1}" if turn else name


def longest_name(length: Callable[[str], int]) -> str:
    """Return the name whose words are the longest, by `length`."""
    return f"{max(_ADJECTIVES, key=length)}-{max(_NOUNS, key=length)}"


ANSWER_TOKENS = 16
DEFAULT_PROMPTS_PER_LENGTH = 10
_LARGEST_NUMBER = 50_000
_SPARE_TOKENS = 8  # by which prompts with other names and numbers may differ
_SHORTEST = 1024  # the instructions alone take some 200 tokens
_HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
    "certain line index. Now the record start:\n\n"
)
_TAIL = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number. "
_CUE = "\nline {name}: REGISTER_CONTENT is <"


def lines(subject: Subject, settings: EvaluationSettings, on_progress: Advance) -> TaskOutcome:
    """Ask for numbers with and without compression, greedily, by length of the list.

    Raises
    ------
    DataError
        If no prompt fits the model, or the rows are not LongEval's.
    """
    skipped = 0
    if subject.data is None:
        questions, key = _generated(subject, settings), "length"
    else:
        questions, skipped = _read(subject, subject.data, settings.limit)
        key = "num_lines"
    answers = ask(subject, settings, questions, _is_right, on_progress)
    metrics: dict[str, Any] = {"accuracy": compared_samples(answers.scored, settings.seed)}
    for group, own in grouped(answers.scored, lambda s: s["facts"][key]).items():
        metrics[f"accuracy@{group}"] = compared(*scores(own))
    num_tokens = sum(sample["num_tokens"] for sample in answers.samples)
    notes = {**template_notes(subject.tokenizer), "prompts_too_long_for_the_model": skipped}
    return TaskOutcome(metrics, answers.bits, num_tokens, answers.cost, ("accuracy",), answers.failed, notes)


def _is_right(question: Question, text: str) -> float:
    found = re.search(r"\d+", text)
    return float(found is not None and int(found[0]) == question.facts["expected"])


def _generated(subject: Subject, settings: EvaluationSettings) -> list[Question]:
    questions, least = [], _least_tokens(subject.tokenizer)
    for length in [n for n in prompt_lengths(settings.context) if n >= _SHORTEST] or [settings.context]:
        require_room(subject.model, "line retrieval", length, ANSWER_TOKENS, least, "instructions and one line")
        rng = np.random.default_rng([settings.seed, length])
        for i in range(settings.limit or DEFAULT_PROMPTS_PER_LENGTH):
            questions.append(_made(subject.tokenizer, length, f"{length}/{i}", rng))
    return questions


def _made(tokenizer: Any, length: int, name: str, rng: np.random.Generator) -> Question:
    """Return a question with as many lines as fit `length` tokens."""
    per_line = len(prompt_ids(tokenizer, _line("abundant-aardvark", 12345)))
    all_names = line_names(length // 4, rng)
    numbers = rng.integers(1, _LARGEST_NUMBER, len(all_names)).tolist()
    asked = float(rng.random())

    def build(count: int) -> tuple[Any, int]:
        index = int(asked * count)
        body = "".join(map(_line, all_names[:count], numbers[:count]))
        return _ids(tokenizer, _HEAD + body + _TAIL.format(name=all_names[index]), all_names[index]), index

    count = max(1, length // per_line)
    while count < len(all_names) and len(build(count)[0]) < length:
        count += 1
    while count > 1 and len(build(count)[0]) > length:
        count -= 1
    ids, index = build(count)
    facts = {"length": length, "num_lines": count, "depth": index / count, "expected": numbers[index]}
    return Question(name, ids, ANSWER_TOKENS, facts)


def _least_tokens(tokenizer: Any) -> int:
    """Return the tokens of a prompt of one line, whatever that is called."""
    name = longest_name(lambda word: len(plain_ids(tokenizer, word)))
    prompt = _HEAD + _line(name, _LARGEST_NUMBER - 1) + _TAIL.format(name=name)
    return len(_ids(tokenizer, prompt, name)) + _SPARE_TOKENS


def _line(name: str, number: int) -> str:
    return f"line {name}: REGISTER_CONTENT is <{number}>\n"


def _ids(tokenizer: Any, prompt: str, name: str) -> Any:
    if has_chat_template(tokenizer):
        return prompt_ids(tokenizer, chat_text(tokenizer, prompt))
    return prompt_ids(tokenizer, prompt.rstrip() + _CUE.format(name=name))


def check_line_rows(path: Path) -> dict[str, list[Row]]:
    """Return the rows of LongEval's files at `path`, by the name of the file.

    Raises
    ------
    DataError
        If a row is not as LongEval's are; the file and the row are named.
    """
    found = read_rows(path, {"prompt": str, "expected_number": int, "num_lines": int, "random_idx": list})
    for file, rows in found.items():
        for i, row in enumerate(rows):
            _check_row(row, f"{path}, {file}, row {i}")
    return found


def _check_row(row: Row, where: str) -> None:
    if not checked_text(row["prompt"], "prompt", where).strip():
        raise DataError(f"{where}: the prompt is empty; expected a text to ask. Correct or remove the row.")
    if not row["random_idx"] or not isinstance(row["random_idx"][0], str):
        found = shown(row["random_idx"])
        raise DataError(
            f"{where}: random_idx is {found}; expected a list that begins with the name of a line. Correct the row."
        )


def _read(subject: Subject, path: Path, limit: int | None) -> tuple[list[Question], int]:
    questions, longest, skipped, positions = [], 0, 0, num_positions(subject.model)
    for file, rows in check_line_rows(path).items():
        for i, row in enumerate(rows[:limit]):
            ids = _ids(subject.tokenizer, row["prompt"], str(row["random_idx"][0]))
            facts = {"num_lines": row["num_lines"], "expected": row["expected_number"]}
            longest = max(longest, len(ids))
            if positions is not None and len(ids) + ANSWER_TOKENS > positions:
                skipped += 1
                continue
            questions.append(Question(f"{file}/{i}", ids, ANSWER_TOKENS, facts))
    if not questions:
        raise DataError(
            f"no prompt of {path} fits the model's {positions} positions (the longest has {longest} "
            "tokens); choose a file with fewer lines, or leave out --data to have prompts made"
        )
    return sorted(questions, key=lambda question: (len(question.ids), question.name)), skipped
