from pathlib import Path
from typing import Any

import pytest
from tiny_chain import fit_artifact, tiny_llama

from pqkv_cli.runtime import Artifact, load


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load(fit_artifact(tiny_llama(), tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def artifact_file(artifact: Artifact) -> Path:
    return artifact.path
