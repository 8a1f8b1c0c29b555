"""Bits that go where they help: ``--budget``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--iterations", 2, "--prototype-bits", 0)


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out most rates: what is tested is where they go."""
    from pqkv_cli.fitting import allocation

    rated = allocation.rated_specs
    monkeypatch.setattr(allocation, "rated_specs", lambda *a: {b: s for b, s in rated(*a).items() if b in (1, 2, 3, 4)})


@pytest.mark.parametrize("budget", [2, 2.7])
def test_codes_take_the_budget_on_average(pqkv: Callable, run: Path, quickly: None, budget: float) -> None:
    answer = pqkv("fit-codebooks", run, "--budget", budget, *QUICK, "--json", "-")
    assert answer.code == 0, answer.err
    facts = answer.json["facts"]
    assert facts["allocation"] == "measured" and budget - 0.5 <= facts["bits"] <= budget
    record = json.loads((run / "codebooks" / "allocation.json").read_text())
    assert record["budget"] == budget and len(record["places"]) == 4
    assert all(place["kl_bits_alone"] > 0 for place in record["places"])
    assert len({place["codec"] for place in record["places"]}) <= 6
    assert pqkv("export", run, "--json", "-").json["facts"]["bits_per_channel"] == pytest.approx(facts["bits"])


def test_killed_after_the_trials_and_resumed_gives_the_same_bytes(
    pqkv: Callable, run: Path, quickly: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pqkv_cli.fitting import allocation

    words = ("fit-codebooks", run, "--budget", 2.5, *QUICK)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(allocation, "gradient_costs", killed)
        assert pqkv(*words).code == 130
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "trials").iterdir()}
    assert set(kept) == {f"trial_00{i}.{ending}" for i in range(2) for ending in ("json", "safetensors")}
    assert pqkv(*words).code == 0
    assert kept.items() == {path.name: path.stat().st_mtime_ns for path in (run / "trials").iterdir()}.items()
    (run / "codebooks" / "fit.json").rename(tmp_path / "first.json")
    shutil.rmtree(run / "codebooks")
    shutil.rmtree(run / "trials")
    assert pqkv(*words).code == 0
    assert (run / "codebooks" / "fit.json").read_bytes() == (tmp_path / "first.json").read_bytes()


def test_another_budget_tries_only_rates_that_none_before_has(
    pqkv: Callable, run: Path, quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pqkv_cli.fitting.fit import SideFit
    from pqkv_cli.fitting.trial import TRIAL_VECTORS

    fitted: list[object] = []
    fit = SideFit.fit

    def counted(self: SideFit, layout: Any, iterations: int, *part: int) -> Any:
        fitted.extend([layout] if part == (TRIAL_VECTORS,) else [])
        return fit(self, layout, iterations, *part)

    monkeypatch.setattr(SideFit, "fit", counted)
    assert pqkv("fit-codebooks", run, "--budget", 2.5, *QUICK).code == 0
    first = len(fitted)
    fitted.clear()
    assert pqkv("fit-codebooks", run, "--budget", 2.2, *QUICK).code == 0
    assert len(fitted) < first / 2
    same = (run / "codebooks" / "fit.json").read_bytes()
    shutil.rmtree(run / "trials")
    shutil.rmtree(run / "codebooks")
    assert pqkv("fit-codebooks", run, "--budget", 2.2, *QUICK).code == 0
    assert (run / "codebooks" / "fit.json").read_bytes() == same


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("--budget", 2, "--bits", 2), "both --bits 2 and --budget 2 are given; expected one"),
        (("--budget", 0.3), "codebooks.bits: found 0.3; expected 0.5 to 5"),
        (("--bits", 2.2), "codebooks.bits: found 2.2; expected one of 5, 4.5, 4, 3.5"),
    ],
)
def test_misuse_is_found_before_anything_is_opened(pqkv: Callable, run: Path, words: tuple[object, ...], phrase: str) -> None:
    answer = pqkv("fit-codebooks", run, *words)
    assert answer.code == 2 and phrase in " ".join(answer.err.split())


def test_a_budget_that_few_vectors_cannot_have_is_refused(pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path]) -> None:
    words = ["--data", texts[0], "--samples", 8, "--seq-len", 16, "-o", "small"]
    assert pqkv("calibrate", tiny_model, *words).code == 0
    answer = pqkv("fit-codebooks", "small", "--budget", 5)
    assert answer.code == 2
    assert "no rate fits heads of [16] channels and 112 calibration vectors" in " ".join(answer.err.split())
