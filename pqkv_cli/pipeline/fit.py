"""The stage that learns codebooks from a calibration."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from statistics import fmean

from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.fitting.allocation import ALLOCATION_FILE, Allocation
from pqkv_cli.fitting.plan import KeySpaces, mean_bits, uniform_plan
from pqkv_cli.fitting.refine_files import final_directory
from pqkv_cli.fitting.run import fit_codebooks, fit_share, load_fitted
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.fitting.trial import num_trial_vectors
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.key_space import planned_spaces, rotary_layers, sample_store
from pqkv_cli.pipeline.loading import open_model
from pqkv_cli.pipeline.outcome import Facts, StageOutcome, StageWork, do_stage
from pqkv_cli.pipeline.refine import OpenModel, RefineStage
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import stage_inputs
from pqkv_cli.rates import CodeStyle
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import CacheSpec, CompressionPlan, ModelGeometry, Side


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
            store = _store(run, shape, planned_spaces(shape, plan), opened)
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
        store = _store(run, shape, planned_spaces(shape, plan), partial(open_model, recipe, reporter))
        fit_share(store, shape, plan, run.codebooks, fit_settings(recipe), ranks)


def _planned(
    run: Run, recipe: Recipe, shape: ModelGeometry, settings: FitSettings, reporter: Reporter, opened: OpenModel
) -> Callable[[], CompressionPlan]:
    """Return what makes the plan, after everything that can be wrong with the request has been found."""
    wanted, style, exact = recipe.codebooks, code_style(recipe), cache_spec(recipe)
    spaces: KeySpaces = dict.fromkeys(rotary_layers(shape), wanted.key_space)
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


def _store(run: Run, shape: ModelGeometry, spaces: KeySpaces, opened: OpenModel) -> CalibrationStore:
    """Return the run's samples with keys in `spaces`; a model is opened only for keys after rotary embedding."""
    needed = "post_rope" in spaces.values()
    return sample_store(run, shape, spaces, opened()[0] if needed else None)


def fit_settings(recipe: Recipe) -> FitSettings:
    """Return how the recipe fits; vectors count by gradients where its calibration measures them."""
    weighting: Weighting = "fisher" if recipe.calibration.fisher else FitSettings().key_weighting
    return FitSettings(recipe.seed, recipe.codebooks.iterations, weighting, weighting)


def code_style(recipe: Recipe) -> CodeStyle:
    """Return what the recipe's codes are made of."""
    wanted = recipe.codebooks
    return CodeStyle(wanted.profile, wanted.prototype_bits, wanted.key_map, wanted.value_map)


def cache_spec(recipe: Recipe) -> CacheSpec:
    """Return what the recipe keeps exact."""
    return CacheSpec(recipe.cache.num_sinks, recipe.cache.window_tokens)


def _mean(errors: Sequence[Mapping[Side, tuple[float, ...]]], side: Side) -> float:
    return fmean(error for layer in errors if layer for error in layer[side])
