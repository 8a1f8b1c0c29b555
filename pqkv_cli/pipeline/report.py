"""Gathers what a run has come to and writes its report. Loads no model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.artifact.schema import ARTIFACT_FILE
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.artifact.summary import summarize
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.channels import ChannelPeaks, channel_peaks
from pqkv_cli.evaluation.record import SCHEMA
from pqkv_cli.files import write_text
from pqkv_cli.pipeline.rundir import BENCH_FILE, PARETO_FILE, PEERS_FOLDER
from pqkv_cli.pipeline.start import started_run
from pqkv_cli.pipeline.target import Target
from pqkv_cli.report.page import ReportSource, report_page

REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written, and how many results are in it."""

    path: Path
    num_records: int
    num_other_records: int


def write_report(target: Target, out: Path | None) -> Report:
    """Write the report of a run or an artifact to `out`, by default ``report.html`` in its directory.

    Raises
    ------
    RunError
        If the target has no artifact, or a result is damaged or of another form.
    ArtifactError
        If the artifact is damaged.
    UsageError
        If matplotlib cannot be imported.
    """
    directory, file, results = _places(target)
    artifact = open_artifact(file)
    records = [record for path in sorted(results.glob("*.json")) if (record := _read(path)).get("schema") == SCHEMA]
    own = [record for record in records if record.get("artifact_sha256") == artifact.sha256]
    comparison = results / PEERS_FOLDER / PARETO_FILE
    points = _read(comparison).get("points", []) if comparison.is_file() else []
    timed = results / BENCH_FILE
    bench = _read(timed) if timed.is_file() else {}
    channels, num_others = _channels(directory / "calibration", artifact), len(records) - len(own)
    source = ReportSource(artifact.header, summarize(artifact), own, points, num_others, channels, bench)
    path = out or directory / REPORT_FILE
    write_text(path, _page(source, results), RunError)
    return Report(path, len(own), num_others)


def _page(source: ReportSource, results: Path) -> str:
    try:
        return report_page(source)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"the results in {results} cannot be drawn ({type(error).__name__}: {error}); expected records as pqkv eval "
            "and pqkv bench write them: delete those that were changed or are of another version, and measure again"
        ) from error


def _channels(calibration: Path, artifact: Artifact) -> list[ChannelPeaks]:
    return channel_peaks(CalibrationStore(calibration), artifact) if (calibration / "manifest.json").is_file() else []


def _places(target: Target) -> tuple[Path, Path, Path]:
    """Return the directory of `target`, its artifact and its results."""
    if target.kind == "artifact" and target.path is not None:
        directory = target.path if target.path.is_dir() else target.path.parent
        file = directory / ARTIFACT_FILE if target.path.is_dir() else target.path
        return directory, file, directory / "results"
    run = started_run(target)
    if not run.artifact_file.is_file():
        raise RunError(f"{run.path} has no artifact to report on yet; make it with: pqkv export {run.path}")
    return run.path, run.artifact_file, run.results


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"the result {path} cannot be read ({error}); delete it and evaluate again") from error
    if not isinstance(content, dict):
        raise RunError(f"the result {path} holds a {type(content).__name__}; expected an object: delete it and evaluate again")
    return content
