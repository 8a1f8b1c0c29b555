"""The stage that runs text through the model and records what its cache looks like."""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from pqkv_cli.calibration.collect import CollectSettings, collect, kept_bytes
from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.calibration.store import read_json
from pqkv_cli.calibration.windows import mixed_windows, with_recall
from pqkv_cli.errors import RunError, is_out_of_memory
from pqkv_cli.files import free_bytes
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import free_memory
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.calibration_text import named_texts, tell_written, written_texts
from pqkv_cli.pipeline.fingerprints import model_fingerprint, texts_identity
from pqkv_cli.pipeline.loading import open_model
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import Facts, StageOutcome, StageWork, do_stage, stage_inputs
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Reporter


def calibrate(run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Calibrate `run`, going on where an interrupted calibration with the same settings stopped.

    Raises
    ------
    ModelError, DataError
        If the model or the text cannot be used; nothing is written then.
    """
    wanted = recipe.calibration
    fingerprint = model_fingerprint(resolve_model(recipe.model).path_or_id)
    content = {"model": fingerprint, "data": texts_identity(wanted.data, fingerprint, recipe.seed)}

    def prepare() -> "_Work":
        return _Work(run, recipe, reporter)

    inputs = stage_inputs(run, recipe, "calibrate", content)
    outcome = do_stage(run, recipe, StageWork("calibrate", inputs, run.calibration, prepare), reporter)
    if outcome.was_done:
        tell_written(recipe, run)
        current_ranks().broadcast(True)  # what `collect` says where it finds everything finished
    return outcome


def assist_calibrate(run: Run, recipe: Recipe, reporter: Reporter) -> None:
    """Run this process's share of the windows, for the first process to write."""
    _Work(run, recipe, reporter).collect()


class _Work:
    """The model and its texts, opened and found good; what the model itself writes it writes at work."""

    def __init__(self, run: Run, recipe: Recipe, reporter: Reporter) -> None:
        self.run, self.recipe, self.reporter = run, recipe, reporter
        self.texts = named_texts(recipe)
        self.model, self.tokenizer = open_model(recipe, reporter)
        if len(self.texts) == len(recipe.calibration.data):
            self._cut(list(self.texts.values()))  # too short a text is found before anything is written

    def _cut(self, texts: list[str]) -> None:
        """Cut `texts` into windows, and settle what decides the result."""
        wanted, seed = self.recipe.calibration, self.recipe.seed
        windows = mixed_windows(self.tokenizer, texts, wanted.samples, wanted.seq_len, seed)
        self.windows = with_recall(self.tokenizer, windows, wanted.recall_share, seed)
        self.settings = CollectSettings(
            data_sha256=hashlib.sha256("\n\n".join(texts).encode()).hexdigest(),
            num_samples=wanted.samples,
            seq_len=wanted.seq_len,
            batch_size=wanted.batch_size,
            reservoir_size=wanted.reservoir_size,
            seed=seed,
            fisher_draws=wanted.fisher,
        )

    def __call__(self) -> Facts:
        """Run the windows through the model and say what came of it."""
        asked = self.recipe.calibration.batch_size
        self.collect()
        settings = self.settings
        return {
            **({"batch_size": settings.batch_size} if settings.batch_size < asked else {}),
            "windows": settings.num_samples,
            "windows_held_out": settings.num_held_out,
            "tokens_seen": settings.num_windows * settings.seq_len,
            "vectors_kept_per_head": min(settings.reservoir_size, settings.num_windows * settings.seq_len),
            "bytes": sum(path.stat().st_size for path in self.run.calibration.glob("*.safetensors")),
        }

    def collect(self) -> None:
        """Run the windows through the model; of several processes each its share.

        Alone, where memory does not suffice for a batch, it begins again with half as many windows in each, and ends with the
        bytes that a calibration asked for with that size ends with.
        """
        if SELF in self.recipe.calibration.data:
            self._cut(written_texts(self.recipe, self.run, self.texts, self.model, self.tokenizer, self.reporter))
        self.settings = _come_down_to(self.run.calibration, self.settings)
        _check_room(self.run.calibration, kept_bytes(geometry(self.model.config), self.settings), self.reporter)
        while True:
            try:
                with self.reporter.progress("calibrate") as advance:
                    return collect(self.model, self.windows, self.run.calibration, self.settings, advance)
            except Exception as error:
                if not is_out_of_memory(error) or self.settings.batch_size == 1 or current_ranks().size > 1:
                    raise
            # Behind the clause: until its end the error holds on to all that was allocated.
            free_memory()
            self._halve()

    def _halve(self) -> None:
        size, half = self.settings.batch_size, self.settings.batch_size // 2
        self.settings = replace(self.settings, batch_size=half)
        found = f"out of memory with {size} windows at once"
        self.reporter.note(f"warning: {found}; calibrating again with {half}, as --batch-size {half}")
        shutil.rmtree(self.run.calibration, ignore_errors=True)  # sums of batches of both sizes would be of neither


def _check_room(directory: Path, num_bytes: int, reporter: Reporter) -> None:
    """Say what a calibration takes on disk before it begins, and refuse to begin where that is not free.

    Parts are kept until all layers are written, so for a moment there are both.
    """
    if (directory / "manifest.json").is_file() or (directory / "parts").is_dir():
        return  # goes on, or is done
    free = free_bytes(directory)
    if free < 2 * num_bytes:
        raise RunError(
            f"the calibration in {directory} needs {2 * num_bytes:,} bytes while it is written and {num_bytes:,} afterwards, "
            f"and {free:,} are free; free some space, choose another place with -o, or keep fewer vectors (--reservoir-size)"
        )
    reporter.note(f"the calibration keeps {num_bytes / 1e6:,.0f} MB in {directory}")


def _come_down_to(directory: Path, settings: CollectSettings) -> CollectSettings:
    """Return `settings` with the smaller batch that the calibration begun in `directory` has come down to, if it has."""
    for path in (directory / "manifest.json", directory / "parts" / "settings.json"):
        with suppress(RunError):  # damaged: `collect` says what to do
            found = read_json(path).get("settings") if path.is_file() else None
            size = settings.batch_size
            while size > 1:
                size //= 2
                if found == asdict(replace(settings, batch_size=size)):
                    return replace(settings, batch_size=size)
    return settings
