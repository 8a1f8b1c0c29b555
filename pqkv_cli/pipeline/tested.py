"""Which versions of libraries pqkv is tested with: those that its own tests install. Knows one folder, and no library."""

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass

_FOLDER = "constraints"


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """A library: the version that pqkv is `tested` with, and the one `found` here."""

    package: str
    tested: str
    found: str

    @property
    def is_tested(self) -> bool:
        """Whether they are the same; a build for one kind of device (2.13.0+cpu) is no other version."""
        return self.found.split("+")[0] == self.tested


def pythons_tested() -> tuple[str, ...]:
    """Return the versions of Python, such as 3.11, for which there are tested versions."""
    folder = importlib.resources.files("pqkv_cli").joinpath(_FOLDER)
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    found = [match[1] for name in names if (match := re.fullmatch(r"python(\d+\.\d+)\.txt", name))]
    return tuple(sorted(found, key=lambda version: tuple(map(int, version.split(".")))))


def versions_tested(python: str) -> dict[str, str]:
    """Return the tested version of every library on `python`, such as 3.11; none where there are none."""
    if python not in pythons_tested():
        return {}
    file = importlib.resources.files("pqkv_cli").joinpath(_FOLDER, f"python{python}.txt")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {normal_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def compared(tested: Mapping[str, str], present: Mapping[str, str]) -> tuple[KnownVersion, ...]:
    """Return those of the packages `present` that have a tested version."""
    known = {package: tested.get(normal_name(package)) for package in present}
    return tuple(KnownVersion(package, version, present[package]) for package, version in known.items() if version is not None)


def in_words(python: str, versions: tuple[KnownVersion, ...]) -> tuple[bool, str]:
    """Return whether all `versions` on `python` are the tested ones, and a sentence about it."""
    if not versions:
        return False, f"none for Python {python}; pqkv is tested with Python {', '.join(pythons_tested())}"
    others = [f"{each.package} {each.found} (tested with {each.tested})" for each in versions if not each.is_tested]
    if not others:
        return True, f"all {len(versions)} are the versions that pqkv is tested with on Python {python}"
    return False, f"{', '.join(others)}; allowed, but if something fails, try the tested ones"


def normal_name(package: str) -> str:
    """Return the one spelling of a package's name: ``types_PyYAML`` is types-pyyaml."""
    return re.sub(r"[-_.]+", "-", package).lower()
