"""``pqkv doctor``: a machine that is fit, and the traps that make one unfit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from platform import python_version

import pytest

from pqkv_cli.pipeline import doctor
from pqkv_cli.pipeline.doctor import (
    Diagnosis,
    Finding,
    comparison_finding,
    encoding_finding,
    pythons_tested,
    shadow_finding,
    triton_findings,
    version_findings,
    versions_tested,
)


def named(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine(pqkv: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    document = pqkv("doctor", "--json", "-").json
    found = {finding["name"]: finding["found"] for finding in document["findings"]}
    assert document["schema"] == "pqkv.doctor/1"
    for name in ("python", "torch", "transformers", "safetensors", "devices", "triton", "backend", "reference model"):
        assert found[name]
    assert found["tested versions"]
    versions = {each["package"]: each for each in document["versions"]}
    assert versions.keys() <= versions_tested(".".join(python_version().split(".")[:2])).keys()
    assert "torch" in versions or not versions
    assert found["backend"].split(",")[0] in ("torch", "native", "triton")


def test_people_see_a_table_and_the_artifact_is_asked(pqkv: Callable, exported: Path) -> None:
    answer = pqkv("doctor", exported)
    assert ("this machine" in answer.out, "because" in answer.out) == (True, True)
    assert pqkv("doctor", "nowhere").code == 2


def test_versions_out_of_range_or_missing_are_wrong() -> None:
    versions = {"old": "5.16.0", "new": "6.0", "right": "5.20", "built": "2.9.0+cu128"}
    requirements = [f"{name}<6,>=5.17" for name in ("old", "new", "right", "absent")]
    requirements += ["built>=2.8", 'other>=1; extra == "gpu"', 'elsewhere>=1; platform_system == "Nowhere"']
    found = named(version_findings(requirements, versions.get))
    assert {name: finding.state for name, finding in found.items()} == {
        "python": "good",
        "old": "wrong",
        "new": "wrong",
        "right": "good",
        "absent": "wrong",
        "built": "good",
    }
    assert found["old"].found == "5.16.0; expected <6,>=5.17"
    assert found["absent"].remedy == "pip install 'absent<6,>=5.17'"


def test_without_requirements_nothing_is_vouched_for() -> None:
    assert named(version_findings([], {}.get))["pqkv"].state == "wrong"


TESTED = {"torch": "2.13.0", "typer": "0.29.2", "types-pyyaml": "6.0.12", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("present", "state", "found"),
    [
        ({"torch": "2.13.0", "typer": "0.29.2"}, "good", "all 2 are the versions that pqkv is tested with on Python 3.11"),
        ({"torch": "2.13.0+cu130"}, "good", "all 1 are the versions that pqkv is tested with on Python 3.11"),
        ({"torch": "2.13.0", "unknown": "1.0"}, "good", "all 1 are the versions that pqkv is tested with on Python 3.11"),
        (
            {"torch": "2.13.1+cpu", "types_PyYAML": "6.0.11", "typer": "0.29.2"},
            "note",
            "torch 2.13.1+cpu (tested with 2.13.0), types_PyYAML 6.0.11 (tested with 6.0.12); "
            "allowed, but if something fails, try the tested ones",
        ),
        ({}, "note", f"none for Python 3.11; pqkv is tested with Python {', '.join(pythons_tested())}"),
    ],
)
def test_other_versions_than_the_tested_are_worth_knowing(
    present: dict[str, str], state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(doctor, "versions_tested", {"3.11": TESTED}.get)
    finding, versions = comparison_finding(present)
    assert (finding.name, finding.state, finding.found) == ("tested versions", state, found)
    assert {each.package for each in versions} == present.keys() - {"unknown"}
    document = Diagnosis((finding,), versions).document()
    assert document["healthy"]
    assert all(each["is_tested"] == (each["found"].split("+")[0] == each["tested"]) for each in document["versions"])


def test_the_tested_versions_are_those_that_tests_install() -> None:
    assert {"3.11", "3.12", "3.13"} <= set(pythons_tested())
    for python in pythons_tested():
        assert versions_tested(python).keys() >= {"torch", "transformers", "safetensors", "types-pyyaml"}
    assert versions_tested("3.10") == versions_tested("../3.11") == {}


@pytest.mark.parametrize(
    ("has_gpu", "version", "interpret", "compiler", "wrong"),
    [
        (False, None, None, None, []),
        (False, "3.4", "1", None, []),
        (True, "3.4", None, "/usr/bin/gcc", []),
        (True, "3.4", "0", "/usr/bin/gcc", []),
        (True, None, None, "/usr/bin/gcc", ["triton"]),
        (True, "3.4", "1", "/usr/bin/gcc", ["interpreter"]),
        (True, "3.4", None, None, ["C compiler"]),
    ],
)
def test_what_stands_in_tritons_way(
    has_gpu: bool, version: str | None, interpret: str | None, compiler: str | None, wrong: list[str]
) -> None:
    found = Diagnosis(tuple(triton_findings(has_gpu, version, interpret, compiler)))
    assert [finding.name for finding in found.wrong] == wrong
    assert all(finding.remedy for finding in found.wrong)
    assert found.document()["healthy"] is not bool(wrong)


def test_a_plain_folder_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plainfolder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert shadow_finding("plainfolder").state == "good"


def test_a_library_that_is_what_it_says_shadows_nothing() -> None:
    assert shadow_finding("safetensors").found.startswith("the library itself")


def test_a_package_called_kernels_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pqkv_cli", "doctor"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "this machine is not fit" in done.stderr
    assert f"{tmp_path / 'kernels' / '__init__.py'} shadows the library" in done.stderr


def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pqkv_cli", "doctor"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "import torch: OSError: libcudart.so.12" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "of_locale", "streams", "state", "phrase"),
    [
        ({"LANG": "en_US.UTF-8"}, "utf-8", {"stdout": "utf-8"}, "good", "utf-8; all characters can be shown"),
        ({}, "UTF-8", {"stdout": None}, "good", "UTF-8; all characters"),
        (
            {"LC_ALL": "C"},
            "ANSI_X3.4-1968",
            {"stdout": "utf-8"},
            "note",
            "the locale is ASCII (LC_ALL=C); Python itself uses UTF-8; set LC_ALL=C.UTF-8",
        ),
        (
            {},
            "ascii",
            {"stdin": "ascii", "stdout": "ascii", "stderr": "ascii"},
            "note",
            "stderr is ASCII (no LC_ALL or LANG is set); stderr and stdout show other characters as escapes",
        ),
        ({"PYTHONIOENCODING": "latin1"}, "utf-8", {"stdout": "latin1"}, "note", "stdout is latin1 (PYTHONIOENCODING=latin1)"),
        ({}, "utf-8", {"stdout": "unheard-of"}, "note", "stdout is unheard-of"),
    ],
)
def test_a_locale_without_all_characters_is_named(
    variables: dict[str, str], of_locale: str, streams: dict[str, str | None], state: str, phrase: str
) -> None:
    found = encoding_finding(variables, of_locale, streams)
    assert (found.name, found.state) == ("encoding", state)
    assert phrase in found.found


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}])
def test_an_ascii_locale_is_found(variables: dict[str, str]) -> None:
    line = [sys.executable, "-m", "pqkv_cli", "doctor", "--json", "-"]
    done = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True, check=False)
    (finding,) = (each for each in json.loads(done.stdout)["findings"] if each["name"] == "encoding")
    assert (finding["state"], "the locale is ASCII" in finding["found"]) == ("note", True)
