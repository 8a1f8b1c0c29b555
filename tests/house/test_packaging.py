import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import pqkv_cli
from pqkv_cli.recipe_files import recipe_names


@pytest.fixture(scope="session")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_listed(root: Path, project: dict[str, Any]) -> None:
    found = {".".join(path.parent.relative_to(root).parts) for path in root.glob("pqkv_cli/**/__init__.py")}
    found |= {".".join(path.parent.relative_to(root / "kernels").parts) for path in root.glob("kernels/**/__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"pqkv_recipes"}


def test_every_folder_with_sources_is_a_package(root: Path) -> None:
    folders = {path.parent for top in ("pqkv_cli", "kernels/pqkv_kernels") for path in (root / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_mapping_is_the_one_that_installs(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["package-dir"] == {
        "pqkv_kernels": "kernels/pqkv_kernels",
        "pqkv_recipes": "recipes",
    }


def test_versions_agree(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == pqkv_cli.__version__


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folder_is_no_package(root: Path, folder: str) -> None:
    # A top-level package called `kernels` shadows the library that transformers imports by this name.
    assert list((root / folder).glob("__init__.py")) == []


def test_no_test_folder_is_a_package(root: Path) -> None:
    assert list((root / "tests").rglob("__init__.py")) == []


def test_transformers_models_import_from_the_root(root: Path) -> None:
    code = "from transformers import LlamaForCausalLM, AttentionInterface; import pqkv_kernels; print(pqkv_kernels.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "pqkv_kernels"), done.stderr


def test_recipes_are_found_through_the_package() -> None:
    wanted = (
        "demo gemma-3-12b gpt-oss-20b llama-2-7b llama-3-8b llama-3.1-8b llama-3.2-1b llama-3.2-3b mistral-7b phi-4 qwen2.5-7b "
        "qwen3-32b qwen3-8b smollm2-135m smollm3-3b"
    )
    assert recipe_names() == tuple(wanted.split())
