"""The stage that learns codebooks from a calibration and, where asked to, refines them on its text."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.calibration.store import CalibrationStore, RotatedStore
from pqkv_cli.calibration.windows import mixed_windows, with_recall
from pqkv_cli.errors import RunError
from pqkv_cli.fitting.allocation import ALLOCATION_FILE, Allocation
from pqkv_cli.fitting.plan import KeySpaces, mean_bits, uniform_plan
from pqkv_cli.fitting.record import FitRecord
from pqkv_cli.fitting.refine import refine
from pqkv_cli.fitting.refine_files import final_directory, forget_refinement, load_outcome, refine_request, save_refinement
from pqkv_cli.fitting.refine_work import RefineSettings
from pqkv_cli.fitting.run import fit_codebooks, fit_share, load_fitted
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.fitting.trial import num_trial_vectors
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.pipeline.calibration_text import calibration_texts
from pqkv_cli.pipeline.loading import open_model
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import Facts, StageOutcome, StageWork, do_stage, stage_inputs
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import CompressionPlan, ModelGeometry, Side

# Windows to refine on, at most: more than were calibrated on, if the text has more.
MOST_WINDOWS = 192

# Returns the model and its tokenizer, the same ones each time.
OpenModel = Callable[[], tuple[Any, Any]]


def fit(run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Fit the codebooks of `run`, going on where an interrupted fit with the same settings stopped.

    Raises
    ------
    RunError
        If the run is not calibrated.
    UsageError
        If the rate does not fit the model; nothing is written then.
    """
    inputs = stage_inputs(run, recipe, "fit-codebooks", {})

    def prepare() -> Callable[[], Facts]:
        shape = geometry(load_config(resolve_model(recipe.model)))
        settings = fit_settings(recipe)
        opened = cache(partial(open_model, recipe, reporter))
        planned = _planned(run, recipe, shape, settings, reporter, opened)
        CalibrationStore(run.calibration)  # or there is nothing to fit
        refinement = RefineStage(run, recipe, reporter, opened) if recipe.codebooks.refine else None

        def act() -> Facts:
            ranks = current_ranks()
            plan = ranks.broadcast(planned())
            store = _store(run, shape, _planned_spaces(shape, plan), opened)
            fit_share(store, shape, plan, run.codebooks, settings, ranks)
            with reporter.progress("fit-codebooks") as advance:
                record = fit_codebooks(store, shape, plan, run.codebooks, settings, advance)
            facts = {
                "allocation": recipe.codebooks.allocation,
                "bits": round(mean_bits(shape, plan), 4),
                "layers_fitted": sum(map(bool, record.relative_error)),
                "layers_dense": sum(not errors for errors in record.relative_error),
                "relative_error_keys": _mean(record.relative_error, "keys"),
                "relative_error_values": _mean(record.relative_error, "values"),
            }
            return facts if refinement is None else facts | dict(refinement(record))

        return act

    def read() -> object:
        return load_fitted(final_directory(run.codebooks))

    outcome = do_stage(run, recipe, StageWork("fit-codebooks", inputs, run.codebooks, prepare, read=read), reporter)
    if outcome.was_done:
        current_ranks().broadcast(None)
    return outcome


def assist_fit(run: Run, recipe: Recipe, reporter: Reporter) -> None:
    """Fit this process's share of the layers, once the first process has planned them."""
    ranks = current_ranks()
    plan = ranks.broadcast(None)
    if plan is not None:
        shape = geometry(load_config(resolve_model(recipe.model)))
        store = _store(run, shape, _planned_spaces(shape, plan), partial(open_model, recipe, reporter))
        fit_share(store, shape, plan, run.codebooks, fit_settings(recipe), ranks)


def _planned(
    run: Run, recipe: Recipe, shape: ModelGeometry, settings: FitSettings, reporter: Reporter, opened: OpenModel
) -> Callable[[], CompressionPlan]:
    """Return what makes the plan, after everything that can be wrong with the request has been found."""
    wanted, style, exact = recipe.codebooks, recipe.codebooks.style, recipe.cache.spec
    spaces: KeySpaces = dict.fromkeys(_rotary_layers(shape), wanted.key_space)
    if wanted.allocation == "uniform":
        plan = uniform_plan(shape, wanted.bits, exact, style, spaces)
        return lambda: plan
    allocation = Allocation(
        shape,
        wanted.bits,
        style,
        settings,
        spaces=spaces,
        num_vectors=num_trial_vectors(CalibrationStore(run.calibration).positions()),
        trials=run.trials,
        record=run.codebooks / ALLOCATION_FILE,
    )
    model, _ = opened()

    return lambda: allocation.plan(model, _store(run, shape, spaces, opened), exact, reporter)


def _rotary_layers(geometry: ModelGeometry) -> list[int]:
    """Return the layers whose keys can be coded in either space."""
    return [i for i, layer in enumerate(geometry.layers) if not layer.dense_reason and layer.rotary is not None]


def _planned_spaces(geometry: ModelGeometry, plan: CompressionPlan) -> KeySpaces:
    """Return where `plan` codes the keys of rotary layers."""
    codecs = {index: plan.codec(index, "keys") for index in _rotary_layers(geometry)}
    return {index: codec.key_space for index, codec in codecs.items() if codec is not None and codec.key_space is not None}


def _store(run: Run, shape: ModelGeometry, spaces: KeySpaces, opened: OpenModel) -> RotatedStore:
    """Return the run's samples with keys in `spaces`; a model is opened only for keys after rotary embedding."""
    model: Any = opened()[0] if "post_rope" in spaces.values() else None
    turned = {}
    for index, space in spaces.items():
        rotary = shape.layers[index].rotary
        if space == "post_rope" and rotary is not None:
            turned[index] = (rotary_angles(model, index), rotary)
    return RotatedStore(run.calibration, turned)


def fit_settings(recipe: Recipe) -> FitSettings:
    """Return how the recipe fits; vectors count by gradients where its calibration measures them."""
    weighting: Weighting = "fisher" if recipe.calibration.fisher else FitSettings().key_weighting
    return FitSettings(recipe.seed, recipe.codebooks.iterations, weighting, weighting)


def _mean(errors: Sequence[Mapping[Side, tuple[float, ...]]], side: Side) -> float:
    return fmean(error for layer in errors if layer for error in layer[side])


class RefineStage:
    """The model and its windows, opened and found good.

    Raises
    ------
    RunError
        If the text is not the one that the run was calibrated on.
    """

    def __init__(self, run: Run, recipe: Recipe, reporter: Reporter, opened: OpenModel) -> None:
        self._run, self._reporter = run, reporter
        self._settings = RefineSettings(seed=recipe.seed)
        self._model, tokenizer = opened()
        self._held_out = CalibrationStore(run.calibration).held_out()
        self._windows = _refine_windows(run, recipe, tokenizer, self._held_out)

    def __call__(self, record: FitRecord) -> Facts:
        """Refine the fit of `record`, unless that has been done, and return what it came to."""
        directory = self._run.codebooks
        request = refine_request(record, self._windows, self._held_out, self._settings)
        outcome = load_outcome(directory)
        if outcome is None or outcome["request_sha256"] != request:
            forget_refinement(directory)
            with self._reporter.progress("refine") as advance:
                found = refine(
                    self._model,
                    load_fitted(directory),
                    self._windows,
                    self._held_out,
                    self._settings,
                    advance,
                )
            outcome = save_refinement(directory, record, found, request)
        if not outcome["is_better"]:
            self._reporter.note("refine: no improvement beyond chance on held-out text; the codebooks stay as they were fitted")
        return _refine_facts(outcome)


def _refine_windows(run: Run, recipe: Recipe, tokenizer: Any, held_out: torch.Tensor) -> torch.Tensor:
    """Return all windows of the calibration text but those held out, [N, T]: first those calibrated on, then others."""
    wanted = recipe.calibration
    everything = mixed_windows(tokenizer, calibration_texts(recipe, run), None, wanted.seq_len, recipe.seed)
    everything = with_recall(tokenizer, everything, wanted.recall_share, recipe.seed)
    first = wanted.samples - len(held_out)
    if not torch.equal(everything[first : wanted.samples], held_out):
        raise RunError(
            f"{' and '.join(wanted.data)} is not the text that the run was calibrated on: other windows would be held out; "
            "expected the same; run pqkv calibrate again"
        )
    return torch.cat((everything[:first], everything[wanted.samples :]))[:MOST_WINDOWS]


def _refine_facts(outcome: dict[str, Any]) -> Facts:
    before, after = (fmean(outcome["held_out_kl_bits"][name]) for name in ("before", "after"))
    return {"refined": outcome["is_better"], "held_out_kl_bits": before, "held_out_kl_bits_refined": after}
