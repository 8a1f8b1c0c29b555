"""Refining codebooks of a tiny model: results only ever improve, and a run remembers them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.calibration.fisher import frozen
from pqkv_cli.errors import RunError, UsageError
from pqkv_cli.fitting.record import FitRecord, load_record
from pqkv_cli.fitting.refine import Refinement, is_better, refine
from pqkv_cli.fitting.refine_files import final_directory, load_outcome, refine_request, save_refinement
from pqkv_cli.fitting.refine_work import CodecSums, PassCounter, RefineSettings, RefineWork, WatchedCodec, Weighting, moved
from pqkv_cli.fitting.run import load_fitted
from pqkv_cli.quantizers.codec import ProductCodec
from pqkv_cli.runtime.attach import simulate
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.layout import CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import from_code_space

WINDOWS, HELD_OUT = tokens(48, 64, seed=11), tokens(24, 64, seed=12)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    fit_artifact(model, path, bits=2)
    return path / "codebooks2"


@pytest.fixture(scope="module")
def refined(model: Any, directory: Path) -> Refinement:
    return refine(model, load_fitted(directory), WINDOWS, HELD_OUT)


def every_table(layers: Any) -> list[CodecTables]:
    return [layer.tables[side] for layer in layers for side in SIDES]


def divergence(model: Any, layers: Any, windows: torch.Tensor) -> float:
    codecs = [{side: ProductCodec(layer.tables[side]) for side in SIDES} for layer in layers]
    with torch.no_grad(), simulate(model, codecs) as simulation:
        wanted = model(windows, use_cache=False).logits.log_softmax(-1)
        found = model(windows, past_key_values=simulation.new_cache(), use_cache=True).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_it_improves_on_text_that_nobody_has_seen(model: Any, directory: Path, refined: Refinement) -> None:
    assert refined.is_better and refined.weighting is not None
    assert list(refined.selection) == sorted(refined.selection, reverse=True)
    unseen = tokens(8, 48, seed=3)
    assert divergence(model, refined.layers, unseen) < 0.97 * divergence(model, load_fitted(directory), unseen)


def test_only_codebooks_change_and_stay_what_artifacts_hold(directory: Path, refined: Refinement) -> None:
    pairs = list(zip(every_table(load_fitted(directory)), every_table(refined.layers), strict=True))
    assert all(torch.equal(old.map, new.map) and old.layout == new.layout for old, new in pairs)
    books = [(a, b) for old, new in pairs for a, b in zip(sum(old.codebooks, ()), sum(new.codebooks, ()), strict=True)]
    assert all(b.dtype == torch.float16 and bool(torch.isfinite(b).all()) for _, b in books)
    assert any(not torch.equal(a, b) for a, b in books)


def test_errors_are_measured_on_held_out_vectors(refined: Refinement) -> None:
    assert all(0 < error < 1 for layer in refined.layers for side in SIDES for error in layer.relative_error[side])


def test_the_same_seed_gives_the_same_bytes(model: Any, directory: Path, refined: Refinement) -> None:
    again = refine(model, load_fitted(directory), WINDOWS, HELD_OUT)
    assert again.before == refined.before and again.after == refined.after
    for one, other in zip(every_table(refined.layers), every_table(again.layers), strict=True):
        assert all(map(torch.equal, sum(one.codebooks, ()), sum(other.codebooks, ())))


def test_the_model_is_left_as_it_was(model: Any, refined: Refinement) -> None:
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.base_model._forward_pre_hooks


class Nudged(ProductCodec):
    """Adds something to the first row's vectors in code space."""

    def __init__(self, tables: CodecTables, nudge: torch.Tensor) -> None:
        super().__init__(tables)
        self.nudge = nudge

    def encode_decode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode_decode(x) + from_code_space(self.nudge, self.tables, rotated=False)


def test_scores_say_what_an_error_changes(model: Any, directory: Path) -> None:
    # In the values of the last layer: nothing is coded after them, so nothing but what is nudged changes.
    layers, window = load_fitted(directory), WINDOWS[0]
    watched = [{side: WatchedCodec(layer.tables[side]) for side in SIDES} for layer in layers]
    with frozen(model), simulate(model, watched) as simulation:
        flat = [codec[side] for codec in watched for side in SIDES]
        work = RefineWork(model, simulation, flat, RefineSettings(), PassCounter(1, None))
        likely = work.logits(window, "traced").log_softmax(-1)
        shift = flat[-1].trace.shift
        score = torch.autograd.grad(likely.gather(-1, window[:, None]).sum(), shift)[0]
    place = tuple(int(i) for i in torch.nonzero(score.abs() == score.abs().max())[0])

    def likelihood(size: float) -> float:
        nudge = torch.zeros_like(shift)
        nudge[place] = size
        codecs = [{side: ProductCodec(layer.tables[side]) for side in SIDES} for layer in layers]
        codecs[-1]["values"] = Nudged(layers[-1].tables["values"], nudge)
        with torch.no_grad(), simulate(model, codecs) as simulation:
            logits = model(window[None], past_key_values=simulation.new_cache(), use_cache=True).logits[0]
        return float(logits.double().log_softmax(-1).gather(-1, window[:, None]).sum())

    assert (likelihood(0.01) - likelihood(-0.01)) / 0.02 == pytest.approx(float(score[place]), rel=0.02)


def test_exact_codecs_change_nothing(model: Any, directory: Path) -> None:
    watched = [{side: WatchedCodec(layer.tables[side]) for side in SIDES} for layer in load_fitted(directory)]
    with torch.no_grad(), simulate(model, watched) as simulation:
        flat = [codec[side] for codec in watched for side in SIDES]
        found = RefineWork(model, simulation, flat, RefineSettings(), PassCounter(1, None)).logits(WINDOWS[0], "exact")
        torch.testing.assert_close(found, model(WINDOWS[:1], use_cache=False).logits[0], atol=2e-3, rtol=0)
    assert all(codec.exact is not None and codec.mode == "coded" for codec in flat)


def planted(agree: bool) -> tuple[CodecSums, torch.Tensor]:
    """Return sums whose halves want every centroid at one place, or at opposite ones, and those places [1, 1, 4, 2]."""
    generator = torch.Generator().manual_seed(0)
    tables = CodecTables(CodeLayout.uniform(2, 1, 2), ((torch.zeros(1, 1, 4, 2, dtype=torch.float16),),))
    sums, places = CodecSums(tables, "fisher"), torch.randn(4, 2, generator=generator)
    for half in (0, 1):
        codes = torch.randint(4, (1, 1, 1, 4000), generator=generator)
        error = places[codes[0, 0]][None] * (1 if agree or half else -1)
        score = torch.rand(1, 1, 4000, 2, generator=generator)
        sums.add(half, [codes], error + torch.randn(error.shape, generator=generator), score)
    return sums, places.view(1, 1, 4, 2)


def test_centroids_move_to_where_both_halves_want_them() -> None:
    sums, places = planted(agree=True)
    torch.testing.assert_close(sums.steps()[0], places, atol=0.1, rtol=0.1)


def test_nothing_moves_where_halves_disagree() -> None:
    assert not planted(agree=False)[0].steps()[0].any()


def test_nothing_moves_without_weight() -> None:
    tables = CodecTables(CodeLayout.uniform(2, 1, 2), ((torch.zeros(1, 1, 4, 2, dtype=torch.float16),),))
    sums = CodecSums(tables, "root")
    sums.add(0, [torch.zeros(1, 1, 1, 5, dtype=torch.int64)], torch.ones(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    assert not sums.steps()[0].any()


@pytest.mark.parametrize(("weighting", "weights"), [("equal", (1, 1)), ("root", (3, 1)), ("fisher", (9, 1))])
def test_parts_are_weighted_by_what_they_cost(weighting: Weighting, weights: tuple[float, float]) -> None:
    # Two subspaces of two channels; in the first the earlier vector matters more, in the second both do alike.
    tables = CodecTables(CodeLayout.uniform(4, 2, 1), ((torch.zeros(1, 2, 2, 2, dtype=torch.float16),),))
    sums = CodecSums(tables, weighting)
    error = torch.tensor([[[[2.0, 2.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]]]])
    score = torch.tensor([[[[3.0, -3.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]]]])
    for half in (0, 1):
        sums.add(half, [torch.zeros(1, 1, 2, 2, dtype=torch.int64)], error, score)
    mean = (sum(weights) + 2) / 4  # over the four cells, two of them empty
    first, second = (2 * (2 * w + 5 * v) / (2 * (w + v) + 0.03 * mean) for w, v in (weights, (1, 1)))
    assert sums.steps()[0].flatten().tolist() == pytest.approx([first, first, 0, 0, second, second, 0, 0])


def test_no_step_changes_no_byte(directory: Path) -> None:
    tables = every_table(load_fitted(directory))[0]
    still = moved(tables, [torch.zeros(table.shape) for stage in tables.codebooks for table in stage])
    assert all(map(torch.equal, sum(tables.codebooks, ()), sum(still.codebooks, ())))


def test_an_improvement_must_be_more_than_chance() -> None:
    settings, before = RefineSettings(), [0.1, 0.2, 0.15, 0.12, 0.3, 0.11]
    assert is_better(before, [0.9 * kl for kl in before], settings)
    assert not is_better(before, before, settings)
    assert not is_better(before, [1.05 * kl for kl in before], settings)
    assert not is_better(
        before, [kl + noise for kl, noise in zip(before, (-0.04, 0.03, -0.02, 0.02, -0.03, 0.01), strict=True)], settings
    )
    assert not is_better(before[:3], [0.9 * kl for kl in before[:3]], settings)


def test_what_does_not_improve_is_kept(model: Any, directory: Path) -> None:
    layers = load_fitted(directory)
    # Three windows can prove nothing.
    found = refine(model, layers, WINDOWS[:8], HELD_OUT[:3], RefineSettings(rounds=1))
    assert not found.is_better and all(map(lambda a, b: a is b, found.layers, layers))


def test_too_little_text_is_refused(model: Any, directory: Path) -> None:
    with pytest.raises(UsageError, match="3 windows to refine with; expected at least 4"):
        refine(model, load_fitted(directory), WINDOWS[:3], HELD_OUT)


def copy_of(directory: Path, target: Path) -> FitRecord:
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return load_record(target)


def test_a_refinement_lies_beside_the_fit(directory: Path, refined: Refinement, tmp_path: Path) -> None:
    record = copy_of(directory, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert final_directory(tmp_path / "run") == tmp_path / "run"
    request = refine_request(record, WINDOWS, HELD_OUT, RefineSettings())
    save_refinement(tmp_path / "run", record, refined, request)
    final = load_fitted(final_directory(tmp_path / "run"))
    for one, other in zip(every_table(refined.layers), every_table(final), strict=True):
        assert all(map(torch.equal, sum(one.codebooks, ()), sum(other.codebooks, ())))
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())
    outcome = load_outcome(tmp_path / "run")
    assert outcome is not None and outcome["is_better"] and outcome["request_sha256"] == request
    assert outcome["held_out_kl_bits"]["after"] == list(refined.after)
    # A later refinement that does not pay leaves nothing of the earlier one.
    save_refinement(tmp_path / "run", record, replace(refined, is_better=False), request)
    assert final_directory(tmp_path / "run") == tmp_path / "run"
    assert not (tmp_path / "run" / "refined").exists()


def test_other_text_and_other_settings_are_other_requests(directory: Path) -> None:
    record = load_record(directory)
    requests = [
        refine_request(record, WINDOWS, HELD_OUT, RefineSettings()),
        refine_request(record, WINDOWS + 1, HELD_OUT, RefineSettings()),
        refine_request(record, WINDOWS, HELD_OUT + 1, RefineSettings()),
        refine_request(record, WINDOWS, HELD_OUT, RefineSettings(seed=1)),
    ]
    assert len(set(requests)) == 4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "has schema 'list'; expected 'pqkv.refinement/1'"),
        (json.dumps({"schema": "pqkv.refinement/9", "is_better": True}), "has schema 'pqkv.refinement/9'"),
        (json.dumps({"schema": "pqkv.refinement/1", "is_better": 1}), "says of is_better 1; expected true or false"),
    ],
)
def test_a_damaged_outcome_is_named(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / "refinement.json").write_text(content)
    with pytest.raises(RunError, match=rf"refinement.json {fault}.*; delete it and run pqkv fit-codebooks --refine"):
        final_directory(tmp_path)
