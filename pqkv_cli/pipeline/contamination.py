"""Finds out whether codebooks were learned from the very text they are judged on, and says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from pqkv_cli.calibration.stdlib_text import overlap_share
from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.rows import read_rows
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.pipeline.calibration_text import calibration_texts
from pqkv_cli.pipeline.start import Source
from pqkv_cli.reporter import Reporter

NGRAM_WORDS = 13
SUSPICIOUS_SHARE = 0.01
Overlap = Mapping[str, Any] | None


def overlaps(source: Source, subject: Subject, reporter: Reporter) -> dict[str, Overlap]:
    """Return how much of the evaluation's ``text`` and of its ``rows`` also occurs in the calibration text.

    Each is the ``share`` of their distinct runs of 13 normalised words, with a ``note`` where it is suspicious or could not be
    found out; None where there is nothing to compare.
    """
    texts = {"text": subject.text, "rows": _row_text(subject)}
    return {name: overlap(source, text, reporter) for name, text in texts.items()}


def overlap(source: Source, text: str, reporter: Reporter) -> Overlap:
    """Return how much of `text` also occurs in the calibration text, as in `overlaps`; None of an empty one."""
    if not text:
        return None
    try:
        calibration = calibration_texts(source.recipe, source.run)
    except DataError as error:
        return {"share": None, "ngram_words": NGRAM_WORDS, "note": f"the calibration text could not be read: {error}"}
    found = _overlap(text, calibration)
    if note := found.get("note"):
        reporter.note(f"warning: {note}")
    return found


def _overlap(text: str, calibration: Sequence[str]) -> dict[str, Any]:
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
