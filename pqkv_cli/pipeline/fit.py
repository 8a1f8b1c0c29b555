"""The stage that learns codebooks from a calibration."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.fitting.plan import uniform_plan
from pqkv_cli.fitting.run import fit_codebooks
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.outcome import Facts, StageOutcome, StageWork, do_stage
from pqkv_cli.pipeline.reporter import Reporter
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import stage_inputs
from pqkv_cli.recipe import Recipe
from pqkv_cli.specs import CacheSpec, Side


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
        plan = uniform_plan(shape, recipe.codebooks.bits, cache_spec(recipe), recipe.codebooks.prototype_bits)
        store = CalibrationStore(run.calibration)
        settings = FitSettings(seed=recipe.seed, iterations=recipe.codebooks.iterations)

        def act() -> Facts:
            with reporter.progress("fit-codebooks") as advance:
                record = fit_codebooks(store, shape, plan, run.codebooks, settings, advance)
            return {
                "bits": recipe.codebooks.bits,
                "layers_fitted": sum(map(bool, record.relative_error)),
                "layers_dense": sum(not errors for errors in record.relative_error),
                "relative_error_keys": _mean(record.relative_error, "keys"),
                "relative_error_values": _mean(record.relative_error, "values"),
            }

        return act

    return do_stage(run, recipe, StageWork("fit-codebooks", inputs, run.codebooks, prepare), reporter)


def cache_spec(recipe: Recipe) -> CacheSpec:
    """Return what the recipe keeps exact."""
    return CacheSpec(recipe.cache.num_sinks, recipe.cache.window_tokens)


def _mean(errors: Sequence[Mapping[Side, tuple[float, ...]]], side: Side) -> float:
    return fmean(error for layer in errors if layer for error in layer[side])
