from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from family_models import family_model
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


@pytest.fixture(scope="session")
def family_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Artifact]]:
    """A tiny model of a family and its artifact, made once for all tests."""

    @cache
    def make(name: str) -> tuple[Any, Artifact]:
        model = family_model(name)
        return model, load(fit_artifact(model, tmp_path_factory.mktemp(name)))

    return make
