import itertools
import json
import math
from pathlib import Path

import fitting_support as support
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.allocation import Candidate, allocate, byte_price_at
from pqkv_cli.fitting.fit import SideFit, fit_side
from pqkv_cli.fitting.plan import rated_specs
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.trial import NOTHING_TRIED, Trial, base_rate, load_trial, save_trial, try_layer
from pqkv_cli.rates import CodeStyle
from pqkv_cli.specs import SIDES


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Candidate]], int]:
    """Up to four sides with up to four rates of one or two codec families, and a budget."""
    sides = []
    for index in range(draw(st.integers(1, 4))):
        rates = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))
        family = "kv"[index % 2]
        tables = draw(st.lists(st.integers(0, 100), min_size=len(rates), max_size=len(rates)))
        losses = draw(st.lists(st.integers(0, 1000), min_size=len(rates), max_size=len(rates)))
        sides.append(
            [
                Candidate(f"{family}{r}", r, 8 * r, table, loss / 1000)
                for r, table, loss in zip(rates, tables, losses, strict=True)
            ]
        )
    return sides, draw(st.integers(8, 8 * 6 * len(sides)))


@given(problems(), st.integers(2, 6), st.sampled_from([0.0, 0.001, 0.1]))
@settings(deadline=None)
def test_the_choice_is_the_best_of_all_that_are_allowed(
    problem: tuple[list[list[Candidate]], int], max_codecs: int, price: float
) -> None:
    sides, budget = problem
    allowed = [
        choice
        for choice in itertools.product(*sides)
        if sum(c.page_bytes for c in choice) <= budget and len({c.codec for c in choice}) <= max_codecs
    ]
    if not allowed:
        return

    def cost(choice: tuple[Candidate, ...]) -> float:
        return sum(c.loss + price * c.table_bytes for c in choice)

    found = allocate(sides, budget, max_codecs, price)
    assert found in allowed
    most = max(cost((c,)) for side in sides for c in side)
    assert cost(found) <= min(map(cost, allowed)) + 1e-3 * max(1e-9, most) * len(sides)


def test_large_tables_that_gain_nothing_are_avoided() -> None:
    side = [Candidate("small", 2, 128, 100, 0.0101), Candidate("large", 2, 128, 100_000, 0.01)]
    price = byte_price_at(0.02, 2 * 64, 1000)
    assert [c.codec for c in allocate([side, side], 256)] == ["large", "large"]
    assert [c.codec for c in allocate([side, side], 256, byte_price=price)] == ["small", "small"]
    # A bit more for each of 128 channels, sixteen bytes per token, is worth the loss times the logarithm of four.
    assert price * 1000 * 16 == pytest.approx(0.02 * math.log(4))


def test_a_budget_below_all_candidates_is_refused() -> None:
    side = [Candidate("k1", 1, 64, 10, 0.5), Candidate("k2", 2, 128, 20, 0.1)]
    with pytest.raises(UsageError, match="100 bytes of codes per page; expected at least 128; raise --budget"):
        allocate([side, side], 100)


def specs() -> dict:
    rated = {side: rated_specs(support.LAYER, side, CodeStyle(prototype_bits=0)) for side in SIDES}
    return {side: {bits: spec for bits, spec in rated[side].items() if bits in (1, 2, 3, 4)} for side in SIDES}


def test_more_bits_leave_smaller_errors() -> None:
    trial = try_layer(support.samples(0), support.LAYER, specs(), 2.2, index=0, settings=FitSettings(iterations=8))
    for side in SIDES:
        errors = {bits: trial.error(side, spec) for bits, spec in specs()[side].items()}
        assert all(errors[low] > errors[high] for low, high in ((1, 2), (2, 3), (3, 4)))
        spec, tables = trial.tables[side]
        assert spec.layout == tables.layout and tables.layout.bits_per_channel == 2


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


def some(*rates: float) -> dict:
    return {side: {bits: spec for bits, spec in menu.items() if bits in rates} for side, menu in specs().items()}


def tried(menus: dict, bits: float, known: Trial = NOTHING_TRIED) -> Trial:
    settings = FitSettings(iterations=4)
    return try_layer(support.samples(0), support.LAYER, menus, bits, index=3, settings=settings, known=known)


def assert_same(found: Trial, expected: Trial) -> None:
    assert found.errors == expected.errors and found.tables.keys() == expected.tables.keys()
    for side, (spec, tables) in found.tables.items():
        assert spec == expected.tables[side][0]
        assert all(a.equal(b) for a, b in zip(tables.codebooks[0], expected.tables[side][1].codebooks[0], strict=True))


def test_trials_are_kept_and_belong_to_their_request(tmp_path: Path) -> None:
    trial, menus = tried(specs(), 2), specs()
    save_trial(tmp_path, 3, trial, "a" * 64)
    assert_same(load_trial(tmp_path, 3, menus, "a" * 64), trial)
    assert trial.answers(menus, 2)
    assert load_trial(tmp_path, 3, menus, "b" * 64) == load_trial(tmp_path, 2, menus, "a" * 64) == NOTHING_TRIED
    path = tmp_path / "trial_003.json"
    path.write_text(path.read_text().replace("keys", "kings"))
    assert load_trial(tmp_path, 3, menus, "a" * 64) == NOTHING_TRIED
    path.write_text(json.dumps([]))
    assert load_trial(tmp_path, 3, menus, "a" * 64) == NOTHING_TRIED


def test_another_budget_fits_only_what_none_before_has_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trial(tmp_path, 3, tried(some(2, 3, 4), 3), "a" * 64)
    known = load_trial(tmp_path, 3, some(1, 2, 3), "a" * 64)
    assert not known.answers(some(1, 2, 3), 1) and known.answers(some(2, 3), 3) and not known.answers(some(2, 3), 2)
    fits, fit = [], SideFit.fit
    monkeypatch.setattr(SideFit, "fit", lambda self, layout, *a: fits.append(layout.bits_per_channel) or fit(self, layout, *a))
    found = tried(some(1, 2, 3), 1, known)
    assert fits == [1, 1]
    save_trial(tmp_path, 3, found, "a" * 64)
    assert load_trial(tmp_path, 3, some(1, 2, 3), "a" * 64).errors == tried(specs(), 1).errors  # the rate 4 is not forgotten
    other = load_trial(tmp_path, 3, some(2, 3), "a" * 64)  # its tables are of a rate that nobody asks for now
    assert other.errors == found.errors and not other.tables
    fits.clear()
    again = tried(some(2, 3), 2, found)  # every rate is known, but not what its cost is measured with
    assert fits == [2, 2]
    assert_same(again, tried(specs(), 2))


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
