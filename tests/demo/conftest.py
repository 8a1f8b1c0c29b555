"""The reference model, and one calibrated, fitted and exported run of it per test session."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.cli.main import main
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model


@dataclass(frozen=True)
class Reference:
    """The embedded model with an artifact of 4 bits per channel."""

    model: Any
    tokenizer: Any
    artifact: Artifact
    run: Path


@pytest.fixture(scope="session")
def reference_model() -> tuple[Any, Any]:
    import torch

    return load_model(resolve_model("demo"), torch.float32, "cpu")


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path], None]:
    """Return what calibrates, fits (few vectors, few iterations) and exports the reference model into a directory."""

    def make(run: Path) -> None:
        fit = ["fit-codebooks", str(run), "--bits", "4", "--iterations", "6"]
        few = ["--no-fisher", "--samples", "64", "--reservoir-size", "16384"]
        for words in (["calibrate", "demo", *few, "-o", str(run)], fit, ["export", str(run)]):
            assert main(words) == 0

    return make


@pytest.fixture(scope="session")
def reference(
    reference_model: tuple[Any, Any], make_run: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reference]:
    run = tmp_path_factory.mktemp("runs") / "demo"
    make_run(run)
    yield Reference(*reference_model, open_artifact(run / "artifact"), run)
