"""Opens two artifacts and says what differs. Knows no terminal."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.artifact.difference import Difference, compare
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.artifact.summary import Summary, summarize

SCHEMA = "pqkv.diff/1"


@dataclass(frozen=True, slots=True)
class OpenedArtifact:
    """One of the two: its file and its numbers."""

    path: Path
    file_bytes: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class ArtifactDiff:
    """Both artifacts and what differs between them."""

    a: OpenedArtifact
    b: OpenedArtifact
    difference: Difference

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON; its keys stay."""
        sides = {name: _side_document(side) for name, side in (("a", self.a), ("b", self.b))}
        return {"schema": SCHEMA, **sides, **asdict(self.difference)}


def diff(a: Path, b: Path) -> ArtifactDiff:
    """Compare the artifacts at `a` and `b`.

    Raises
    ------
    ArtifactError
        If one of them is missing or damaged.
    """
    first, second = open_artifact(a), open_artifact(b)
    return ArtifactDiff(_opened(first), _opened(second), compare(first, second))


def _opened(artifact: Artifact) -> OpenedArtifact:
    return OpenedArtifact(artifact.path, artifact.file_bytes, summarize(artifact))


def _side_document(side: OpenedArtifact) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "sha256": side.summary.sha256,
        "model": side.summary.label,
        "bits_per_channel": side.summary.total_bits,
        "file_bytes": side.file_bytes,
    }
