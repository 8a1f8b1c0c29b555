"""Proves an artifact: it opens, its codecs work, it belongs to a model, it is as good as recorded. Knows no terminal."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pqkv_cli.artifact.check import check_model
from pqkv_cli.artifact.exercise import CodecTest, exercise_codecs
from pqkv_cli.artifact.store import Artifact, artifact_file, open_artifact
from pqkv_cli.errors import ArtifactError, GateError
from pqkv_cli.models.converted import Note, nobody
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.models.load import load_model, settled
from pqkv_cli.models.resolve import ResolvedModel, resolve_model
from pqkv_cli.pipeline.quality import load_recorded, recheck
from pqkv_cli.pipeline.start import Source

SCHEMA = "pqkv.verify/1"
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
            "schema": SCHEMA,
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
