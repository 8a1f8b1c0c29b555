"""A tiny artifact: three layers, the last one dense; a scale before RoPE, a matrix, uneven groups and two stages."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from artifact_maker import make_header, make_tables

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.store import save_artifact
from pqkv_cli.artifact.tensors import LayerTables


@pytest.fixture
def header() -> Header:
    return make_header()


@pytest.fixture
def tables() -> list[LayerTables | None]:
    return make_tables(make_header())


@pytest.fixture
def saved(tmp_path: Path, header: Header, tables: list[LayerTables | None]) -> Path:
    torch.set_num_threads(1)
    path = tmp_path / "pqkv.safetensors"
    save_artifact(path, header, tables)
    return path
