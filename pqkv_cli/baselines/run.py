"""Compares an artifact with its rivals on one text and keeps what came out: records, and which of them nothing beats.

Knows runs and files; measures nothing.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.artifact.check import check_model
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.baselines.comparison import MODE, TASK, Contestant, compare, own_contestant, peer_records, rival_contestant
from pqkv_cli.baselines.protocol import Rival
from pqkv_cli.baselines.registry import parse_rivals
from pqkv_cli.calibration.store import CalibrationStore, SampleStore
from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import UsageError
from pqkv_cli.evaluation.record import OURS
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.files import write_bytes, write_text
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.pipeline.evaluation_settings import task_settings
from pqkv_cli.pipeline.loading import device_of, open_model
from pqkv_cli.pipeline.rundir import PARETO_FILE, PEERS_FOLDER
from pqkv_cli.pipeline.start import Source
from pqkv_cli.report.charts import require_matplotlib
from pqkv_cli.report.pictures import pareto_png
from pqkv_cli.reporter import Reporter

Record = dict[str, Any]
Point = dict[str, Any]

PARETO_SCHEMA = "pqkv.pareto/1"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The records of all contestants, ours first, and the files that hold them."""

    records: list[Record]
    numbers: Path
    picture: Path


def compare_peers(
    source: Source, wanted: str, others: Sequence[Source], reporter: Reporter, *, force: bool = False
) -> Comparison:
    """Measure the artifact of `source`, those of `others` (of the same model) and the rivals `wanted`, side by side.

    Rivals are calibrated on the calibration of the run of `source`. Records go to ``results/peers/``.

    Raises
    ------
    UsageError
        If a rival is unknown, `source` is no run, or matplotlib cannot be imported.
    RunError
        If the run has no calibration.
    ArtifactError
        If an artifact is damaged or, without `force`, of another model.
    DataError
        If the text cannot be used.
    """
    rivals = parse_rivals(wanted)
    require_matplotlib()  # not first after hours, when the picture is drawn
    store, subject, artifacts = open_comparison(source, others, reporter, force=force)
    contestants = [own_contestant(artifact, name) for name, artifact in artifacts]
    contestants += fitted_rivals(rivals, store, subject, source.recipe.seed, reporter)
    settings = task_settings(TASK, MODE, source.recipe, subject)
    with reporter.progress(f"{len(contestants)} contestants on the same text") as advance:
        num_tokens = compare(subject, settings, contestants, advance)
    return _kept(source, peer_records(subject, settings, contestants, num_tokens))


def fitted_rivals(
    rivals: Sequence[Rival], samples: SampleStore, subject: Subject, seed: int, reporter: Reporter
) -> list[Contestant]:
    """Return `rivals` fitted on `samples`; those that cannot be fitted say why."""
    contestants = []
    with reporter.progress("fitting the rivals") as advance:
        for index, rival in enumerate(rivals):
            contestants.append(rival_contestant(rival, samples, subject.model, seed))
            advance(index + 1, len(rivals))
    return contestants


def open_comparison(
    source: Source, others: Sequence[Source], reporter: Reporter, *, force: bool
) -> tuple[CalibrationStore, Subject, list[tuple[str, Artifact]]]:
    """Return the run's calibration, the subject, and all artifacts of ours by name; the cheap ones are opened first.

    Raises
    ------
    UsageError
        If `source` is no run.
    """
    if source.run is None:
        raise UsageError(
            f"{source.artifact} is a lone artifact; rivals are calibrated on the same samples as ours, so name its run "
            "directory instead"
        )
    store = CalibrationStore(source.run.calibration)
    device = device_of(source.recipe)
    artifact = open_artifact(source.artifact, device)
    artifacts = [(OURS, artifact)]
    artifacts += [(f"{OURS} ({_name(other)})", open_artifact(other.artifact, device)) for other in others]
    text = load_text(source.recipe.evaluation.data)
    model, tokenizer = open_model(source.recipe, reporter)
    identity, shape = model_identity(model), geometry(model.config)
    for _, each in artifacts:
        for difference in check_model(each, identity, shape, force=force):
            warnings.warn(difference, stacklevel=2)
    return store, Subject(model, tokenizer, artifact, text, force), artifacts


def _name(source: Source) -> str:
    return source.run.path.name if source.run is not None else source.artifact.parent.name


def _kept(source: Source, records: list[Record]) -> Comparison:
    """Write every record, the numbers of the picture, and the picture."""
    folder = source.results / PEERS_FOLDER
    for record in records:
        write_text(folder / f"{_file_name(record)}.json", json.dumps(record, indent=1) + "\n")
    document = pareto_document(records)
    numbers, picture = folder / PARETO_FILE, folder / "pareto.png"
    write_text(numbers, json.dumps(document, indent=1) + "\n")
    title = f"{records[0]['model']['id']}, {records[0]['settings']['num_tokens']:,} tokens"
    write_bytes(picture, pareto_png(document["points"], title))
    return Comparison(records, numbers, picture)


def _file_name(record: Record) -> str:
    name = str(record["method"]) if record["artifact_sha256"] else f"{record['method']}-{record['native_bits']:g}"
    return re.sub(r"[^\w.+-]+", "-", name).strip("-")


def pareto_document(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of the picture: one point per complete record, the unbeaten ones marked ``on_front``."""
    points = [_point(record) for record in records if record["status"] == "complete"]
    for point in points:
        point["on_front"] = not any(_beats(other, point) for other in points)
    return {
        "schema": PARETO_SCHEMA,
        "x": "bits per channel, everything counted",
        "y": "KL divergence, bits per token, mean",
        "points": points,
    }


def _point(record: Record) -> Point:
    numbers = record["metrics"]
    return {
        "method": record["method"],
        "native_bits": record["native_bits"],
        "bits_per_channel": record["bits_per_channel"]["total"],
        "kl_bits": numbers["kl_bits"]["quantized"],
        "kl_bits_p99": numbers["kl_bits"]["p99"],
        "top1_agreement": numbers["top1_agreement"]["quantized"],
        "perplexity": numbers["perplexity"]["quantized"],
        "artifact_sha256": record["artifact_sha256"],
    }


def _beats(other: Point, point: Point) -> bool:
    """Return whether `other` is no worse in bits and loss, and better in one of them."""
    axes = ("bits_per_channel", "kl_bits")
    return all(other[a] <= point[a] for a in axes) and any(other[a] < point[a] for a in axes)
