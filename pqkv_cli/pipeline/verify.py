"""Is an artifact whole, does it belong to a model, and is it as good as its records say? Knows no terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from pqkv_cli.artifact.check import check_model
from pqkv_cli.artifact.exercise import CodecTest, exercise_codecs
from pqkv_cli.artifact.store import Artifact, artifact_file, open_artifact
from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import ArtifactError, GateError, PqkvError, RunError
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.sample_log import SCHEMA
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.converted import Note, nobody
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.models.load import load_model, settled
from pqkv_cli.models.resolve import ResolvedModel, resolve_model
from pqkv_cli.pipeline.fingerprints import text_identity
from pqkv_cli.pipeline.start import Source

RECORD = "perplexity-all.jsonl"
# The same codes on the same windows: only rounding may differ, in another type or on another device. A wrong rotation, table
# or kernel multiplies the divergence.
TOLERANCE = 0.1
_SLACK_BITS = 1e-5
_SLACK_AGREEMENT = 0.01
_REMEDY = "measure again with: pqkv eval RUN --task perplexity --mode all"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was measured when the artifact was evaluated: how, on which text, and each window's numbers."""

    settings: EvaluationSettings
    data: str
    dtype: str
    windows: Sequence[Mapping[str, Any]]

    def first(self, count: int) -> tuple[float, float]:
        """Return mean KL divergence, bits per token, and top-1 agreement over the first `count` windows."""
        chosen = self.windows[:count]
        return fmean(fmean(w["kl_bits"]) for w in chosen), fmean(fmean(w["agrees"]) for w in chosen)


@dataclass(frozen=True, slots=True)
class Recheck:
    """What came of measuring again."""

    is_met: bool
    detail: str


def load_recorded(source: Source, artifact: Artifact) -> Recorded:
    """Return what is recorded about just this artifact.

    Raises
    ------
    RunError
        If nothing is, it is damaged, or it is about another artifact.
    """
    path = source.results / "samples" / RECORD
    if not path.is_file():
        raise RunError(f"no windows are recorded in {path}; {_REMEDY}")
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        key = head["key"]
        if head["schema"] != SCHEMA or key["artifact_sha256"] != artifact.sha256:
            raise RunError(f"{path} is about another artifact; {_REMEDY}")
        windows = [line for line in lines if "closed" not in line and "failed" not in line]
        recorded = Recorded(EvaluationSettings(**key["settings"]), key["data"], key["dtype"], windows)
        recorded.first(len(windows))
    except (OSError, ValueError, KeyError, TypeError, PqkvError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} cannot be used ({type(error).__name__}: {error}); {_REMEDY}") from error
    return recorded


def recheck(source: Source, recorded: Recorded, artifact: Artifact, model: Any, tokenizer: Any, num_windows: int) -> Recheck:
    """Measure the first `num_windows` windows again and compare with what is recorded of them.

    Raises
    ------
    RunError
        If the text of `source` is not the recorded one.
    DataError
        If the text cannot be read.
    """
    data = source.recipe.evaluation.data
    text = load_text(data)
    if text_identity(data) != recorded.data:
        raise RunError(f"the recorded windows are of another text than {data}; name that text with --data, or {_REMEDY}")
    count = min(num_windows, len(recorded.windows))
    settings = replace(recorded.settings, limit=count)
    subject = Subject(model, tokenizer, artifact, text)
    outcome = perplexity(subject, settings, lambda done, total: None)
    if outcome.failed:
        return Recheck(False, f"{len(outcome.failed)} of {count} windows have no result ({outcome.failed[0]}); {_REMEDY}")
    metrics = outcome.metrics
    kl_bits, agreement = metrics["kl_bits"]["quantized"], metrics["top1_agreement"]["quantized"]
    wanted_bits, wanted_agreement = recorded.first(count)
    is_met = kl_bits <= wanted_bits * (1 + TOLERANCE) + _SLACK_BITS and agreement >= wanted_agreement - _SLACK_AGREEMENT
    return Recheck(
        is_met,
        f"KL {kl_bits:.4g} bits per token (recorded {wanted_bits:.4g}), top-1 agreement {agreement:.4g} (recorded "
        f"{wanted_agreement:.4g}) on {count} windows of {settings.context} tokens; up to {TOLERANCE:.0%} more KL is rounding",
    )


VERIFICATION_SCHEMA = "pqkv.verify/1"
QUALITY = "quality"
_MOST_FAULTS = 5


@dataclass(frozen=True, slots=True)
class QualityRequest:
    """Wish to measure again the first `num_windows` windows of what is recorded in the results of `source`."""

    source: Source
    num_windows: int


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what came of it, in words."""

    name: str
    state: Literal["passed", "failed", "skipped"]
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one artifact; `sha256` is None where it could not be opened."""

    path: Path
    sha256: str | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if check.state == "failed")

    def document(self) -> dict[str, Any]:
        """Return the verification as JSON; its keys stay."""
        return {
            "schema": VERIFICATION_SCHEMA,
            "path": str(self.path),
            "sha256": self.sha256,
            "passed": not self.failed,
            "checks": [asdict(check) for check in self.checks],
        }

    def require_passed(self) -> None:
        """Do nothing if every check has passed.

        Raises
        ------
        ArtifactError
            If one has not; the message holds them all.
        GateError
            If only the quality is not what is recorded.
        """
        if self.failed:
            lines = "\n".join(f"  - {check.name}: {check.detail}" for check in self.failed)
            kind = GateError if [check.name for check in self.failed] == [QUALITY] else ArtifactError
            raise kind(f"{self.path} failed {len(self.failed)} of {len(self.checks)} checks:\n{lines}")


def verify(path: Path, against: str | None = None, quality: QualityRequest | None = None, note: Note = nobody) -> Verification:
    """Check the artifact at `path`, that it belongs to the model `against`, if one is named, and its `quality`, if asked for.

    `note` is told that a GGUF file is converted, where it is.

    Raises
    ------
    ModelError, UnsupportedModelError
        If the model cannot be read. What is wrong with the artifact is in the checks instead.
    RunError
        If the quality is asked for and none is recorded, or on another text.
    """
    # A word that names no model is misuse, to be told before a large artifact is read.
    resolved = None if against is None else resolve_model(against)
    path = artifact_file(path)
    try:
        artifact = open_artifact(path)
    except ArtifactError as error:
        return Verification(path, None, (Check("reader's laws", "failed", str(error)),))
    return Verification(artifact.path, artifact.sha256, tuple(_checks(artifact, resolved, quality, note)))


def _checks(artifact: Artifact, model: ResolvedModel | None, quality: QualityRequest | None, note: Note) -> Iterator[Check]:
    detail = (
        f"content hash {artifact.sha256[:12]}, {artifact.file_bytes:,} bytes; header, geometry, tensors and values are right"
    )
    yield Check("reader's laws", "passed", detail)
    yield from map(_codec_check, exercise_codecs(artifact))
    if model is None:
        yield Check("model", "skipped", f"made for {artifact.header.model.label}; name a model to check with --against")
        return
    # Before the model is loaded: without a record there is nothing to measure for.
    recorded = None if quality is None else load_recorded(quality.source, artifact)
    dtype = None if recorded is None else getattr(torch, recorded.dtype.removeprefix("torch."))
    loaded, tokenizer = load_model(settled(model, note), dtype)
    of_model = _model_check(artifact, model, loaded)
    yield of_model
    if quality is None or recorded is None:
        return
    if of_model.state != "passed":
        yield Check(QUALITY, "skipped", "of another model there is nothing to compare with")
        return
    found = recheck(quality.source, recorded, artifact, loaded, tokenizer, quality.num_windows)
    yield Check(QUALITY, "passed" if found.is_met else "failed", found.detail)


def _codec_check(test: CodecTest) -> Check:
    name = f"{test.side} codec {test.codec}"
    if test.faults:
        left_out = len(test.faults) - _MOST_FAULTS
        shown = "; ".join(test.faults[:_MOST_FAULTS]) + (f"; and {left_out} more" if left_out > 0 else "")
        return Check(name, "failed", f"{shown}; fit the codebooks again and export")
    detail = f"{test.centroids:,} centroids decode to themselves, pages of {test.page_bytes} bytes; layers: {test.layers}"
    return Check(name, "passed", detail)


def _model_check(artifact: Artifact, resolved: ResolvedModel, model: Any) -> Check:
    try:
        notes = check_model(artifact, model_identity(model), geometry(model.config), label=resolved.label)
    except ArtifactError as error:
        return Check("model", "failed", str(error))
    what = "attention weights of three layers" if notes else "weights"
    detail = f"configuration, geometry and {what} are those of {resolved.label}"
    return Check("model", "passed", "; ".join((detail, *notes)))
