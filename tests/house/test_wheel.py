"""What users install: the wheel, built from the sdist, holds everything and nothing else, and works where nothing else lies."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pqkv_cli
from pqkv_cli.recipe_files import recipe_names

# What a checkout has that decides what is built.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pqkv_cli", "kernels", "recipes", "tests", "tools")
PACKAGES = {"pqkv_cli": "pqkv_cli", "pqkv_kernels": "kernels/pqkv_kernels", "pqkv_recipes": "recipes"}


def build(what: str, tree: Path, out: Path) -> Path:
    """Build in a process of its own, as pip does, with what is installed here."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools.build_meta import build_{what}; print(build_{what}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, tree / name)
    return build("sdist", tree, tree / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 brought it, later ones demand it
    with tarfile.open(sdist) as archive:
        archive.extractall(place, **safe)
    (tree,) = place.iterdir()
    return build("wheel", tree, place / "dist")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: Path, root: Path) -> None:
    wanted = {
        f"{package}/{path.relative_to(root / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    metadata = f"pqkv-{pqkv_cli.__version__}.dist-info"
    assert {name for name in names(wheel) if not name.startswith(metadata)} == wanted


def test_recipes_and_the_reference_model_are_in_it(wheel: Path) -> None:
    found = names(wheel)
    assert {f"pqkv_recipes/{name}.yaml" for name in recipe_names()} <= found
    assert {f"pqkv_cli/demo/model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")} <= found
    assert [name for name in found if "test" in name.split("/")[0]] == []


def test_it_declares_the_command_the_license_and_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = f"pqkv-{pqkv_cli.__version__}.dist-info"
        points = configparser.ConfigParser()
        points.read_string(archive.read(f"{metadata}/entry_points.txt").decode())
        about = archive.read(f"{metadata}/METADATA").decode()
        assert archive.read(f"{metadata}/licenses/LICENSE")
    assert dict(points["console_scripts"]) == {"pqkv": "pqkv_cli.cli.main:main"}
    assert "License-Expression: Apache-2.0" in about and "Requires-Python: >=3.11" in about
    assert {"gpu", "eval"} <= {line.split(": ")[1] for line in about.splitlines() if line.startswith("Provides-Extra")}
    assert "pqkv_cli/report/templates/base.html" in names(wheel)


def test_it_works_where_nothing_else_lies(wheel: Path, tmp_path: Path) -> None:
    place, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    empty.mkdir()
    variables = os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=empty, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        "-c", "import pqkv_cli, pqkv_kernels, pqkv_recipes as r; print(pqkv_cli.__file__, pqkv_kernels.__file__, r.__file__)"
    )
    assert [path for path in where.split() if not path.startswith(str(place))] == []
    assert "smollm3-3b" in run("-m", "pqkv_cli", "recipes")
    assert "layers" in run("-m", "pqkv_cli", "inspect", "demo")
