"""What `pqkv doctor` checks: versions, compiler, devices, memory, and what a run or an artifact needs of them."""

import codecs
import importlib.metadata
import importlib.resources
import locale
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from platform import machine, platform, python_version
from typing import Any, Literal

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


SCHEMA = "pqkv.doctor/1"
DISTRIBUTION = "pqkv"
_TRUE = ("1", "true", "yes", "on", "y")
# What decides the encoding, the strongest first.
_LOCALE_NAMES = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LC_CTYPE", "LANG")
_INSTALL = "pip install --upgrade pqkv"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A ``note`` is worth knowing; only ``wrong`` calls for the `remedy`."""

    name: str
    state: Literal["good", "note", "wrong"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found on this machine."""

    findings: tuple[Finding, ...]
    versions: tuple[KnownVersion, ...] = ()

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What must be mended."""
        return tuple(finding for finding in self.findings if finding.state == "wrong")

    def document(self) -> dict[str, Any]:
        """Return the diagnosis as JSON; its keys stay."""
        return {
            "schema": SCHEMA,
            "healthy": not self.wrong,
            "findings": [asdict(finding) for finding in self.findings],
            "versions": [asdict(version) | {"is_tested": version.is_tested} for version in self.versions],
        }


def diagnose(variables: Mapping[str, str], artifact: Path | None = None) -> Diagnosis:
    """Look at this machine; `variables` are those of the environment, `artifact` one whose codes are to be attended to.

    Raises
    ------
    ArtifactError
        If the artifact is damaged.
    """
    findings = list(version_findings(_requirements(), installed_version))
    present = {finding.name: version for finding in findings if (version := installed_version(finding.name)) is not None}
    tested, versions = comparison_finding(present)
    findings += [tested, shadow_finding("kernels"), _demo_finding()]
    streams = {name: getattr(getattr(sys, name), "encoding", None) for name in ("stdin", "stdout", "stderr")}
    findings.append(encoding_finding(variables, locale.getencoding(), streams))
    broken = [finding for finding in map(_import_finding, ("torch", "transformers")) if finding.state == "wrong"]
    if not broken:
        findings += _device_findings(variables, artifact)
    return Diagnosis((*findings, *broken), versions)


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_findings(requirements: list[str], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield a finding for Python, and one per requirement, as `pyproject.toml` writes it, that applies here."""
    yield Finding("python", "good", f"{python_version()} on {platform()}, {machine()}")
    if not requirements:
        yield Finding(DISTRIBUTION, "wrong", "not installed as a package: its requirements are unknown", "pip install -e .")
        return
    if find_spec("packaging") is None:
        yield Finding("packaging", "wrong", "not installed, so no version can be compared", _INSTALL)
        return
    from packaging.requirements import Requirement

    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found, expected = version_of(wanted.name), str(wanted.specifier)
        if found is None:
            yield Finding(wanted.name, "wrong", f"not installed; expected {expected}", f"pip install '{wanted.name}{expected}'")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Finding(wanted.name, "wrong", f"{found}; expected {expected}", f"pip install '{wanted.name}{expected}'")
        else:
            yield Finding(wanted.name, "good", found)


def comparison_finding(present: Mapping[str, str]) -> tuple[Finding, tuple[KnownVersion, ...]]:
    """Say whether the versions of libraries, `present` by name, are those that pqkv is tested with on this Python.

    Others are worth knowing, and no fault: what is allowed is told by `version_findings`.
    """
    python = ".".join(python_version().split(".")[:2])
    versions = compared(versions_tested(python), present)
    is_tested, words = in_words(python, versions)
    return Finding("tested versions", "good" if is_tested else "note", words), versions


def shadow_finding(name: str) -> Finding:
    """Say whether the package `name`, which transformers imports by this name, is another one than the library."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a plain folder of this name has no origin, and does no harm
        return Finding(f"package {name}", "good", "nothing shadows the library of this name")
    try:
        library = importlib.metadata.distribution(name)
        owned = Path(str(library.locate_file(f"{name}/__init__.py"))).resolve() == Path(spec.origin).resolve()
    except importlib.metadata.PackageNotFoundError:
        owned = False
    if owned:
        return Finding(f"package {name}", "good", f"the library itself, {installed_version(name)}")
    remedy = f"rename that package, delete its __init__.py, or take {Path(spec.origin).parent.parent} off Python's path"
    return Finding(f"package {name}", "wrong", f"{spec.origin} shadows the library that transformers imports", remedy)


def encoding_finding(variables: Mapping[str, str], of_locale: str, streams: Mapping[str, str | None]) -> Finding:
    """Say whether the locale, and what stdin, stdout and stderr (`streams`, by name) take, is less than all characters.

    Parameters
    ----------
    variables
        Those of the environment; what decides is named.
    of_locale
        The encoding of the locale.
    streams
        The encodings of the streams, None where one is closed.
    """
    encodings = {"the locale": of_locale, **{name: encoding for name, encoding in streams.items() if encoding}}
    poor = {name: encoding for name, encoding in encodings.items() if not _takes_all(encoding)}
    if not poor:
        return Finding("encoding", "good", f"{of_locale}; all characters can be shown")
    decides = [f"{name}={variables[name]}" for name in _LOCALE_NAMES if variables.get(name)] or ["no LC_ALL or LANG is set"]
    found = ", ".join(f"{name} is {'ASCII' if _is_ascii(encoding) else encoding}" for name, encoding in poor.items())
    loses = sorted(poor.keys() & {"stdout", "stderr"})
    shown = f"; {' and '.join(loses)} show other characters as escapes" if loses else "; Python itself uses UTF-8"
    return Finding("encoding", "note", f"{found} ({', '.join(decides)}){shown}; set LC_ALL=C.UTF-8 to have all of them")


def _takes_all(encoding: str) -> bool:
    try:
        "\u4e2d\U0001f600".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _is_ascii(encoding: str) -> bool:
    try:
        return codecs.lookup(encoding).name == "ascii"
    except LookupError:
        return False


def triton_findings(has_gpu: bool, version: str | None, interpret: str | None, compiler: str | None) -> Iterator[Finding]:
    """Yield what stands in the way of Triton's kernels; without a CUDA GPU nothing of it matters by default.

    Parameters
    ----------
    has_gpu
        Whether there is a CUDA GPU.
    version
        Installed version of Triton.
    interpret
        The variable ``TRITON_INTERPRET``.
    compiler
        A C compiler, which Triton needs to launch its kernels.
    """
    if version is None:
        missing = "not installed, so attention over codes runs in plain torch"
        yield Finding("triton", "wrong" if has_gpu else "note", missing, "pip install 'pqkv[gpu]'" if has_gpu else "")
    else:
        yield Finding("triton", "good", version)
        if has_gpu and compiler is None:
            yield Finding("C compiler", "wrong", "none found; Triton needs one to launch kernels", "install gcc, or set CC")
    if (interpret or "").lower() in _TRUE:
        found = f"TRITON_INTERPRET is {interpret}: kernels are interpreted, thousands of times slower"
        yield Finding("interpreter", "wrong" if has_gpu else "note", found, "unset TRITON_INTERPRET" if has_gpu else "")


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _demo_finding() -> Finding:
    from pqkv_cli.errors import ModelError
    from pqkv_cli.models.resolve import DEMO, resolve_model

    try:
        return Finding("reference model", "good", resolve_model(DEMO).path_or_id)
    except ModelError as error:
        return Finding("reference model", "wrong", str(error), _INSTALL)


def _import_finding(name: str) -> Finding:
    try:
        import_module(name)
    except Exception as error:  # a broken installation can raise anything; all of it is what the user must see
        return Finding(f"import {name}", "wrong", f"{type(error).__name__}: {error}", f"pip install --force-reinstall {name}")
    return Finding(f"import {name}", "good", "works")


def _device_findings(variables: Mapping[str, str], artifact: Path | None) -> Iterator[Finding]:
    import torch

    from pqkv_cli.artifact.store import open_artifact
    from pqkv_cli.runtime.attach import backend_for

    num_gpus = torch.cuda.device_count()
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(num_gpus)]
    names += [f"xpu:{i}" for i in range(torch.xpu.device_count())] + ["mps"] * torch.backends.mps.is_available()
    yield Finding("devices", "good", ", ".join([*names, f"cpu with {torch.get_num_threads()} threads"]))
    compiler = variables.get("CC") or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    yield from triton_findings(num_gpus > 0, installed_version("triton"), variables.get("TRITON_INTERPRET"), compiler)
    tables = () if artifact is None else open_artifact(artifact).tables
    chosen = backend_for("auto", torch.device("cuda" if num_gpus else "cpu"), tables)
    # What must be mended for Triton to run is a finding of its own; codes that it cannot read are only worth knowing.
    slow = num_gpus > 0 and chosen.name == "torch"
    yield Finding("backend", "note" if slow else "good", f"{chosen.name}, because {chosen.reason}")
