"""What a recipe leaves open about a task, filled in for the model at hand, and where its samples go. Runs nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pqkv_cli import __version__
from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.table_files import form_of
from pqkv_cli.calibration.text import HUB, STDLIB, load_text
from pqkv_cli.calibration.text_files import named_file
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.prompts import num_positions
from pqkv_cli.evaluation.sample_log import SampleLog
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject
from pqkv_cli.evaluation.tasks import TASKS
from pqkv_cli.models.footprint import layer_footprints
from pqkv_cli.pipeline.fingerprints import text_identity
from pqkv_cli.pipeline.start import Source
from pqkv_cli.recipe import Recipe

_NO_PATHS = (STDLIB, HUB)
_DEFAULT_WINDOWS = 32
_LONGEST_PROMPT = 4096
_LONGEST_OPENING = 512
_MOST_NEW_TOKENS = 1024
_LONGBENCH_ROOM = 576  # its longest answer, and a chat template
# Tokens of the answer for which prompts as long as the model reaches leave room.
_ANSWER_ROOM = {"passkey": 16, "needle": 64, "lines": 16}
# Prompts answered together: at most so many tokens, and so many bytes of uncompressed cache.
_LEAST_BATCH, _MOST_BATCH = 8192, 65536
_BATCH_BYTES = 2**28


def task_settings(task: str, mode: Mode, recipe: Recipe, subject: Subject) -> EvaluationSettings:
    """Return the settings of `task`: windows as long as calibration's, prompts as long as the model reaches.

    Raises
    ------
    DataError
        If the model has no room for any prompt of the task.
    """
    wanted = recipe.evaluation
    positions = num_positions(subject.model) or _LONGEST_PROMPT
    if task in _ANSWER_ROOM:
        longest = wanted.context or _least(task, min(_LONGEST_PROMPT, positions - _ANSWER_ROOM[task]), positions)
        limit = (wanted.prompts or wanted.limit) if task == "passkey" else wanted.limit
        return EvaluationSettings(mode, longest, limit, recipe.seed, batch_tokens=_batch_tokens(subject))
    if task == "kld_generated":
        context = wanted.context or _least(task, min(_LONGEST_OPENING, positions // 2), positions)
        steps = wanted.max_new_tokens or max(1, min(_MOST_NEW_TOKENS, positions - context))
        return EvaluationSettings(mode, context, wanted.limit, recipe.seed, max_new_tokens=steps)
    if task not in TASKS:
        return EvaluationSettings(mode, positions, wanted.limit, recipe.seed)
    if task == "longbench":
        longest = positions - _LONGBENCH_ROOM if positions > 2 * _LONGBENCH_ROOM else positions // 2
        room = wanted.context or _least(task, longest, positions)
        return EvaluationSettings(mode, room, wanted.limit, recipe.seed, batch_tokens=_batch_tokens(subject))
    context = wanted.context or _least(task, min(recipe.calibration.seq_len, positions), positions)
    return EvaluationSettings(mode, context, wanted.limit or _DEFAULT_WINDOWS, recipe.seed, stride=wanted.stride)


def _least(task: str, tokens: int, positions: int) -> int:
    """Return `tokens`, the prompt that a task takes unless it is told another, or refuse the task.

    Raises
    ------
    DataError
        If the model's positions leave no room for a prompt.
    """
    if tokens < 2:
        raise DataError(
            f"{task} leaves room for {max(tokens, 0)} tokens of prompt in the model's {positions} positions; expected at "
            "least 2: this task cannot run on this model. Leave it out, or take a model with more positions."
        )
    return tokens


def _batch_tokens(subject: Subject) -> int:
    """Return how many tokens to answer together: a step of a small model costs nearly the same for one row and for eight."""
    channels = sum(layer.channels for layer in layer_footprints(subject.model.config))
    per_token = int(channels * subject.model.dtype.itemsize)
    return max(_LEAST_BATCH, min(_MOST_BATCH, _BATCH_BYTES // max(1, per_token)))


def modes_of(task: str, modes: Sequence[Mode]) -> list[Mode]:
    """Return `modes` in the order to measure them: of the harness's tasks only mode `cache` shows which modes they have."""
    return list(modes) if task in TASKS else sorted(modes, key=lambda mode: mode != "cache")


def rows_path(data: str) -> Path | None:
    """Return the path of rows that `data` names, None where it names text.

    Raises
    ------
    DataError
        If it names a path and nothing is there.
    """
    if data.startswith(_NO_PATHS):
        return None
    if data == SELF:
        load_text(data)  # says why it cannot be
    path, _ = named_file(data)
    if not path.exists():
        raise DataError(
            f"data {path} is not there; expected a UTF-8 text file, rows (*.jsonl and the like, or a directory of them), "
            f"{STDLIB}evaluation or {HUB}ORG/NAME"
        )
    return path if path.is_dir() or form_of(path) else None


def open_log(source: Source, task: str, settings: EvaluationSettings, subject: Subject) -> SampleLog:
    """Return the log of a task's samples; it holds those of an interrupted evaluation of the same things."""
    model = subject.artifact.header.model
    key = {
        "task": task,
        "settings": asdict(settings),
        "artifact_sha256": subject.artifact.sha256,
        "weights_sha256": model.weights_sha256,
        "dtype": str(subject.model.dtype),
        "device": subject.model.device.type,
        "data": text_identity(source.recipe.evaluation.data),
        "version": __version__,
    }
    return SampleLog(source.results / "samples" / f"{task}-{settings.mode}.jsonl", key)
