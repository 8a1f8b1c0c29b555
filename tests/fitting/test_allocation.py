import itertools
import json
from pathlib import Path

import fitting_support as support
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.allocation import Candidate, allocate
from pqkv_cli.fitting.plan import rated_specs
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.side import SideFit, fit_side
from pqkv_cli.fitting.trial import base_rate, load_trial, save_trial, try_layer
from pqkv_cli.rates import CodeStyle
from pqkv_cli.specs import SIDES


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Candidate]], int]:
    """Up to four sides with up to four rates of one or two codec families, and a budget."""
    sides = []
    for index in range(draw(st.integers(1, 4))):
        rates = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))
        family = "kv"[index % 2]
        losses = draw(st.lists(st.integers(0, 1000), min_size=len(rates), max_size=len(rates)))
        sides.append([Candidate(f"{family}{r}", r, 8 * r, loss / 1000) for r, loss in zip(rates, losses, strict=True)])
    return sides, draw(st.integers(8, 8 * 6 * len(sides)))


@given(problems(), st.integers(2, 6))
@settings(deadline=None)
def test_the_choice_is_the_best_of_all_that_are_allowed(problem: tuple[list[list[Candidate]], int], max_codecs: int) -> None:
    sides, budget = problem
    allowed = [
        choice
        for choice in itertools.product(*sides)
        if sum(c.page_bytes for c in choice) <= budget and len({c.codec for c in choice}) <= max_codecs
    ]
    if not allowed:
        return
    found = allocate(sides, budget, max_codecs)
    assert found in allowed
    best = min(sum(c.loss for c in choice) for choice in allowed)
    assert sum(c.loss for c in found) <= best + 1e-3 * max(1e-9, max(c.loss for side in sides for c in side)) * len(sides)


def test_a_budget_below_all_candidates_is_refused() -> None:
    side = [Candidate("k1", 1, 64, 0.5), Candidate("k2", 2, 128, 0.1)]
    with pytest.raises(UsageError, match="100 bytes of codes per page; expected at least 128; raise --budget"):
        allocate([side, side], 100)


def specs() -> dict:
    rated = {side: rated_specs(support.LAYER, side, CodeStyle(prototype_bits=0)) for side in SIDES}
    return {side: {bits: spec for bits, spec in rated[side].items() if bits in (1, 2, 3, 4)} for side in SIDES}


def test_more_bits_leave_smaller_errors() -> None:
    trial = try_layer(support.samples(0), support.LAYER, specs(), 2.2, index=0, settings=FitSettings(iterations=8))
    for side in SIDES:
        errors = trial.errors[side]
        assert all(errors[low] > errors[high] for low, high in ((1, 2), (2, 3), (3, 4)))
        assert trial.base[side] == trial.tables[side].layout.bits_per_channel == 2


@pytest.mark.parametrize(
    ("errors", "bits", "expected"),
    [
        ({1: 0.3, 2: 0.1, 3: 0.03, 4: 0.01}, 3, 3),
        ({1: 0.3, 2: 0.1, 3: 0.03, 4: 0.01}, 2.5, 2),
        ({1.5: 0.05, 2: 0.0003, 3: 0.0003, 4: 0.0003}, 3, 1.5),  # all tokens are known by heart from 2 bits on
        ({1: 0.3, 2: 0.01, 3: 0.001}, 3, 2),
        ({1: 0.0, 2: 0.0}, 2, 2),
    ],
)
def test_costs_are_measured_where_there_are_errors(errors: dict[float, float], bits: float, expected: float) -> None:
    assert base_rate(errors, bits) == expected


def test_trials_are_kept_and_belong_to_their_request(tmp_path: Path) -> None:
    trial = try_layer(support.samples(0), support.LAYER, specs(), 2, index=3, settings=FitSettings(iterations=4))
    save_trial(tmp_path, 3, trial, "a" * 64)
    formats = specs()
    loaded = load_trial(tmp_path, 3, formats, "a" * 64)
    assert loaded is not None and (loaded.errors, loaded.base) == (trial.errors, trial.base)
    assert loaded.tables["values"].codebooks[0][0].equal(trial.tables["values"].codebooks[0][0])
    assert load_trial(tmp_path, 3, formats, "b" * 64) is None
    assert load_trial(tmp_path, 2, formats, "a" * 64) is None
    path = tmp_path / "trial_003.json"
    path.write_text(path.read_text().replace("keys", "kings"))
    assert load_trial(tmp_path, 3, formats, "a" * 64) is None
    path.write_text(json.dumps([]))
    assert load_trial(tmp_path, 3, formats, "a" * 64) is None


def test_faulty_samples_are_named() -> None:
    samples = support.samples(0)
    samples.values[1, 5, 0] = float("nan")
    with pytest.raises(DataError, match="layer 7, values: key/value head 1 has NaN"):
        try_layer(samples, support.LAYER, specs(), 2, index=7, settings=FitSettings(iterations=2))


def test_a_trial_arranges_parts_for_each_rate() -> None:
    """A trial with all vectors and rounds is the fit itself, whatever was tried before."""
    settings = FitSettings(iterations=4)
    fit = SideFit(support.samples(0), support.LAYER, specs()["keys"][1], "keys", 0, settings)
    for bits in (1, 2, 4):
        spec = specs()["keys"][bits]
        tables, error = fit.fit(spec.layout, 4)
        expected, expected_error = fit_side(support.samples(0), support.LAYER, spec, "keys", 0, settings)
        assert error.equal(expected_error) and tables.permutation.equal(expected.permutation)
        assert all(
            a.equal(b) for s, t in zip(tables.codebooks, expected.codebooks, strict=True) for a, b in zip(s, t, strict=True)
        )
