"""The versions that are installed for tests: of all packages, within what pyproject.toml allows, and nothing but versions."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pqkv_cli" / "constraints"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINE = re.compile(r"([a-z0-9][a-z0-9-]*)==([0-9][0-9a-z.]*)")
HERE = "{}.{}".format(*sys.version_info[:2])
PYTHONS = [
    match[1]
    for each in PROJECT["project"]["classifiers"]
    if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each))
]


def locked(python: str) -> dict[str, Version]:
    lines = (FOLDER / f"python{python}.txt").read_text(encoding="utf-8").splitlines()
    return {match[1]: Version(match[2]) for line in lines if (match := LINE.fullmatch(line))}


def applying(texts: list[str], python: str, extras: tuple[str, ...] = ("",)) -> Iterator[Requirement]:
    """Yield the requirements that hold on Linux with `python`, those of the `extras` among them."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix"}
    machine |= {"platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}
    machine |= {"implementation_name": "cpython"}
    for requirement in map(Requirement, texts):
        if requirement.marker is None or any(requirement.marker.evaluate(machine | {"extra": extra}) for extra in extras):
            yield requirement


def test_there_is_one_for_every_supported_python() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"python{python}.txt" for python in PYTHONS}


@pytest.mark.parametrize("python", PYTHONS)
def test_it_holds_versions_and_nothing_else(python: str) -> None:
    lines = (FOLDER / f"python{python}.txt").read_text(encoding="utf-8").splitlines()
    head, rest = lines[:2], lines[2:]
    assert all(line.startswith("# ") for line in head) and f"with Python {python}," in head[0]
    assert [line for line in rest if not LINE.fullmatch(line)] == []
    names = [line.split("==")[0] for line in rest]
    assert names == sorted(set(names)) and [name for name in names if name != canonicalize_name(name)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_that_is_declared_is_in_it_and_in_range(python: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"], *extras["test"], *extras["dev"]]
    versions = locked(python)
    wrong = [
        f"{wanted}: {versions.get(canonicalize_name(wanted.name))}"
        for wanted in applying(declared, python)
        if wanted.name != "pqkv"
        and (wanted.name.lower() not in versions or not wanted.specifier.contains(versions[wanted.name.lower()]))
    ]
    assert wrong == [], "run: make lock"


def test_everything_that_those_need_is_in_it_and_in_range() -> None:
    versions = locked(HERE) if HERE in PYTHONS else {}
    wrong = []
    for name in versions:
        try:
            needs = importlib.metadata.requires(name) or []
            installed = Version(importlib.metadata.version(name)).public == str(versions[name])
        except importlib.metadata.PackageNotFoundError:
            continue  # of another kind of device
        for wanted in applying(needs, HERE) if installed else ():
            found = versions.get(canonicalize_name(wanted.name))
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                wrong.append(f"{name} needs {wanted}: {found}")
    assert wrong == [], "run: make lock"


def recipe(*words: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    line = ["make", "--no-print-directory", "--dry-run", f"PYTHON={sys.executable}", "VENV=.venv-of-nobody", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["demo", "test"])
def test_what_is_installed_is_what_is_locked(target: str) -> None:
    (install,) = [line for line in recipe(target).splitlines() if "pip install" in line]
    file = f"pqkv_cli/constraints/python{HERE}.txt"
    assert install.startswith(f"PIP_CONSTRAINT={file} PIP_BUILD_CONSTRAINT={file} ") == (HERE in PYTHONS)


def test_an_unknown_python_is_told() -> None:
    said = recipe("demo", "LOCK=", "PYTHON_VERSION=3.99")
    assert "no versions are locked for Python 3.99: the newest that pyproject.toml allows come" in said
    assert "PIP_CONSTRAINT" not in said


def test_the_newest_are_installed_without_it() -> None:
    steps = recipe("test-newest", "NEWEST_VENV=.venv-of-nobody")
    assert "--upgrade-strategy eager" in steps and "PIP_CONSTRAINT" not in steps
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].startswith("make test-newest || echo ")


def test_environments_are_made_anew_when_versions_change() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^\$\(VENV\)/\.installed\S*: (.*) \|", makefile, re.MULTILINE) == ["pyproject.toml $(LOCK)"] * 2
    environments = set(re.findall(r"\.venv[\w-]*", makefile)) - {".venv"}
    assert {f"{name}/" for name in environments} <= set((ROOT / ".gitignore").read_text(encoding="utf-8").split())
