"""The stage that measures an artifact next to the uncompressed model, and keeps what was measured.

It also finds out whether codebooks were learned from the very text they are judged on, and says so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pqkv_cli.artifact.card import write_derived
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.calibration.stdlib_text import overlap_share
from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.evaluation.rows import read_rows
from pqkv_cli.evaluation.settings import Mode, Subject
from pqkv_cli.evaluation.tasks import check_rows, reads_text, require_tasks, run_task, unmeasured
from pqkv_cli.files import write_text
from pqkv_cli.gates import Gate, judge, parse_gates, split_gates
from pqkv_cli.pipeline.calibration_text import calibration_texts
from pqkv_cli.pipeline.evaluation_settings import modes_of, open_log, rows_path, task_settings
from pqkv_cli.pipeline.fingerprints import text_identity
from pqkv_cli.pipeline.loading import device_of, open_model
from pqkv_cli.pipeline.lock import locked_task
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.start import Source
from pqkv_cli.pipeline.state import Facts, StageWork, do_stage, stage_inputs
from pqkv_cli.recipe import Recipe
from pqkv_cli.report.rows import headline_rows
from pqkv_cli.reporter import Reporter

Record = dict[str, Any]

# Text that codebooks were learned from flatters what is judged on it: so long runs of words in common count, and from this
# share on it is said aloud.
NGRAM_WORDS = 13
SUSPICIOUS_SHARE = 0.01
Overlap = Mapping[str, Any] | None


def evaluate(run: Run, recipe: Recipe, reporter: Reporter) -> list[Record]:
    """Return the records of all tasks and modes of `recipe`, measured now or, if nothing has changed, before.

    Raises
    ------
    RunError
        If the run has no artifact or an outdated one.
    UsageError
        If a gate is about a task or mode that is not evaluated.
    """
    gates = _checked_gates(recipe, reporter, all_gates=True)
    inputs = stage_inputs(run, recipe, "eval", {"data": text_identity(recipe.evaluation.data)})
    source = Source(run.artifact_file, recipe, run.results, run)

    def prepare() -> Callable[[], Facts]:
        subject = _open(source, reporter, force=False)
        return lambda: {"records": _measure(source, subject, reporter)}

    outcome = do_stage(run, recipe, StageWork("eval", inputs, run.results, prepare, keeps_old_files=True), reporter)
    return _judged(source, gates, outcome.facts["records"])


def evaluate_source(source: Source, reporter: Reporter, *, force: bool = False, all_gates: bool = True) -> list[Record]:
    """Measure the artifact of `source` on the tasks and in the modes of its recipe; results are kept beside it.

    Gates of the recipe that no result of this evaluation could meet are an error, or, without `all_gates`, left out aloud.

    Raises
    ------
    ArtifactError
        If the artifact is damaged or, without `force`, of another model.
    DataError
        If the text cannot be used.
    UsageError
        If a gate is about a task or mode that is not evaluated.
    """
    gates = _checked_gates(source.recipe, reporter, all_gates=all_gates)
    return _judged(source, gates, _measure(source, _open(source, reporter, force=force), reporter))


def _checked_gates(recipe: Recipe, reporter: Reporter, *, all_gates: bool) -> list[Gate]:
    wanted = recipe.evaluation
    require_tasks(wanted.tasks, rows_path(wanted.data))
    judged, idle = split_gates(parse_gates(wanted.gates), wanted.tasks, wanted.modes)
    reasons = {gate: unmeasured(gate, wanted.tasks, rows_path(wanted.data)) for gate in judged}
    judged, idle = [gate for gate in judged if not reasons[gate]], idle + [gate for gate in judged if reasons[gate]]
    if idle:
        names = ", ".join(gate.text for gate in idle)
        evaluated = f"{', '.join(wanted.tasks)} in mode {' and '.join(wanted.modes)}"
        if all_gates:
            why = "".join(f"; {reason}" for reason in dict.fromkeys(reasons.values()) if reason)
            raise UsageError(f"nothing that is evaluated could meet the gate {names}; evaluated are {evaluated}{why}")
        reporter.note(f"not judged, because evaluated are {evaluated}: {names}")
    return judged


def _judged(source: Source, gates: list[Gate], records: list[Record]) -> list[Record]:
    if not gates:
        return list(records)
    judged = judge(gates, records)
    for record in judged:
        _keep(source, record)
    return judged


def _keep(source: Source, record: Record) -> None:
    write_text(source.results / f"{record['task']}-{record['mode']}.json", json.dumps(record, indent=1) + "\n")


def _open(source: Source, reporter: Reporter, *, force: bool) -> Subject:
    # The cheap ones first: a damaged artifact or a missing text shows before a model is loaded.
    artifact = open_artifact(source.artifact, device_of(source.recipe))
    wanted = source.recipe.evaluation
    text = load_text(wanted.data) if any(map(reads_text, wanted.tasks)) else ""
    rows = rows_path(wanted.data)
    check_rows(wanted.tasks, rows)
    model, tokenizer = open_model(source.recipe, reporter)
    return Subject(model, tokenizer, artifact, text, force, rows)


def _measure(source: Source, subject: Subject, reporter: Reporter) -> list[Record]:
    records = []
    wanted = source.recipe.evaluation
    shared = _overlaps(source, subject, reporter)
    for task in wanted.tasks:
        for mode in modes_of(task, wanted.modes):
            with locked_task(source.results, task, mode):
                records.append(_measure_task(source, subject, task, mode, shared, reporter))
            if records[-1]["mode"] != mode:
                break  # the task has one mode only, and this was it
    if not source.is_fetched:
        _renew_card(source, subject.artifact)
    return records


def _measure_task(
    source: Source, subject: Subject, task: str, mode: Mode, shared: dict[str, Overlap], reporter: Reporter
) -> Record:
    settings = task_settings(task, mode, source.recipe, subject)
    log = open_log(source, task, settings, subject)
    if log.num_found:
        reporter.note(f"{task}, mode {mode}: going on after {log.num_found} samples")
    own = replace(subject, log=log, asked=[])
    with reporter.progress(f"{task}, mode {mode}") as advance:
        record = run_task(task, own, settings, advance)
    kind = "text" if reads_text(task) else f"asked by {task}" if own.asked else "rows"
    if kind not in shared:
        shared[kind] = _overlap(source, "\n".join(own.asked), reporter)
    record["calibration_overlap"] = shared[kind]
    _keep(source, record)
    log.finish()  # from now on the next evaluation measures again
    return record


def _renew_card(source: Source, artifact: Artifact) -> None:
    own = [record for record in _kept(source.results) if record.get("artifact_sha256") == artifact.sha256]
    write_derived(artifact.path.parent, artifact.header, headline_rows(own))


def _kept(directory: Path) -> list[Record]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]


def _overlaps(source: Source, subject: Subject, reporter: Reporter) -> dict[str, Overlap]:
    """Return how much of the evaluation's ``text`` and of its ``rows`` also occurs in the calibration text.

    Each is the ``share`` of their distinct runs of 13 normalised words, with a ``note`` where it is suspicious or could not be
    found out; None where there is nothing to compare.
    """
    texts = {"text": subject.text, "rows": _row_text(subject)}
    return {name: _overlap(source, text, reporter) for name, text in texts.items()}


def _overlap(source: Source, text: str, reporter: Reporter) -> Overlap:
    """Return how much of `text` also occurs in the calibration text, as in `_overlaps`; None of an empty one."""
    if not text:
        return None
    try:
        calibration = calibration_texts(source.recipe, source.run)
    except DataError as error:
        return {"share": None, "ngram_words": NGRAM_WORDS, "note": f"the calibration text could not be read: {error}"}
    found = _judged_overlap(text, calibration)
    if note := found.get("note"):
        reporter.note(f"warning: {note}")
    return found


def _judged_overlap(text: str, calibration: Sequence[str]) -> dict[str, Any]:
    share = overlap_share(text, calibration, NGRAM_WORDS)
    found: dict[str, Any] = {"share": share, "ngram_words": NGRAM_WORDS}
    if share > SUSPICIOUS_SHARE:
        found["note"] = (
            f"{100 * share:.1f} % of what is evaluated on (runs of {NGRAM_WORDS} words) was calibrated on; "
            "the results flatter: evaluate on other text"
        )
    return found


def _row_text(subject: Subject) -> str:
    if subject.data is None:
        return ""
    try:
        files = read_rows(subject.data, {})
    except DataError:
        return ""  # definitions of tasks, not rows; the task itself complains about bad ones
    words = (value for rows in files.values() for row in rows for value in row.values())
    return "\n".join(value for value in words if isinstance(value, str))
