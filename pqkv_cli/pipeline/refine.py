"""Refining a run's codebooks on its calibration text, after the fit."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.calibration.windows import mixed_windows, with_recall
from pqkv_cli.errors import RunError
from pqkv_cli.fitting.record import FitRecord
from pqkv_cli.fitting.refine import refine
from pqkv_cli.fitting.refine_files import forget_refinement, load_outcome, refine_request, save_refinement
from pqkv_cli.fitting.refine_work import RefineSettings
from pqkv_cli.fitting.run import load_fitted
from pqkv_cli.pipeline.calibration_text import calibration_texts
from pqkv_cli.pipeline.outcome import Facts
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter

# More text than was calibrated on, if there is more; so many windows at most.
MOST_WINDOWS = 192


# Returns the model and its tokenizer, the same ones each time.
OpenModel = Callable[[], tuple[Any, Any]]


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
        self._windows = _windows(run, recipe, tokenizer, self._held_out)

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
        return _facts(outcome)


def _windows(run: Run, recipe: Recipe, tokenizer: Any, held_out: torch.Tensor) -> torch.Tensor:
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


def _facts(outcome: dict[str, Any]) -> Facts:
    before, after = (fmean(outcome["held_out_kl_bits"][name]) for name in ("before", "after"))
    return {"refined": outcome["is_better"], "held_out_kl_bits": before, "held_out_kl_bits_refined": after}
