"""The texts of a run's calibration, for all stages that read them: named ones, and what the model wrote. Knows no windows."""

from collections.abc import Mapping
from typing import Any

from pqkv_cli.calibration.openings import SELF
from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import DataError
from pqkv_cli.pipeline.own_text import own_text
from pqkv_cli.pipeline.reporter import Reporter
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.recipe import Recipe


def named_texts(recipe: Recipe) -> Mapping[str, str]:
    """Return the texts by source, without the one that only the model can write.

    Raises
    ------
    DataError
        If one cannot be used.
    """
    return {source: load_text(source) for source in recipe.calibration.data if source != SELF}


def calibration_texts(recipe: Recipe, run: Run | None) -> list[str]:
    """Return the texts that `run` was calibrated on, in the order of the recipe.

    Raises
    ------
    DataError
        If one cannot be read; of a lone artifact, which has no run, the one that its model wrote.
    """
    named = named_texts(recipe)
    return [named[source] if source in named else _read(recipe, run) for source in recipe.calibration.data]


def written_texts(
    recipe: Recipe, run: Run, named: Mapping[str, str], model: Any, tokenizer: Any, reporter: Reporter
) -> list[str]:
    """Return the texts to calibrate on, in the order of the recipe; what `model` has not written yet it writes now.

    Of several processes the first one writes and tells the others.

    Raises
    ------
    DataError
        If the model writes nothing of use.
    """
    ranks = current_ranks()
    written = own_text(run.texts, recipe)
    if ranks.is_first:
        written.write(model, tokenizer, recipe.seed, reporter)
    own = ranks.told(written.read() if ranks.is_first else None)
    return [named.get(source, own) for source in recipe.calibration.data]


def tell_written(recipe: Recipe, run: Run) -> None:
    """Tell the other processes what was written before, where a finished calibration asks nothing of them."""
    ranks = current_ranks()
    if SELF in recipe.calibration.data and ranks.size > 1:
        ranks.told(_read(recipe, run))


def _read(recipe: Recipe, run: Run | None) -> str:
    if run is None:
        raise DataError(
            "what the model wrote for its calibration stays in the run, and this artifact lies alone; name the run instead"
        )
    return own_text(run.texts, recipe).read()
