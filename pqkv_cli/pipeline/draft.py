"""Writes a recipe for a model from its config. Loads no weights."""

from dataclasses import dataclass
from pathlib import Path

from pqkv_cli.errors import UsageError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.plan import uniform_plan
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.target import resolve_target
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import dump_recipe, override
from pqkv_cli.specs import ModelGeometry

_SUFFIXES = (".yaml", ".yml")
_BF16_BITS = 16


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe for a model, and its text with what was found about the model in front."""

    recipe: Recipe
    text: str


def draft_recipe(model: str) -> Draft:
    """Return the recipe that the model `model` would be quantized with, every setting written out.

    That is what `pqkv run MODEL` would use, with calibration windows no longer than the model reads.

    Raises
    ------
    UsageError
        If `model` is a run, a recipe or an artifact, or the rate does not fit the size of its heads.
    ModelError, UnsupportedModelError
        If its config cannot be read, or its cache cannot be quantized.
    """
    target = resolve_target(model)
    if target.recipe is None or not target.has_default_recipe:
        found = {"run": "a run", "artifact": "an artifact"}.get(target.kind or "", "a recipe already")
        raise UsageError(f"{model} is {found}; expected a model: its directory, its GGUF file or an org/name hub id")
    shape = geometry(load_config(resolve_model(target.recipe.model)))
    check_quantizable(shape)
    recipe, longest = target.recipe, shape.max_positions
    if longest and longest < recipe.calibration.seq_len:
        recipe = override(recipe, {"calibration.seq_len": longest})
    uniform_plan(shape, recipe.codebooks.bits, recipe.cache.spec)  # refuses a rate that does not fit
    return Draft(recipe, _preface(recipe, shape) + dump_recipe(recipe))


def check_recipe_file(file: Path) -> None:
    """Refuse a place where a new recipe may not be written.

    Raises
    ------
    UsageError
        If something is there, or its name is not one of a recipe.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--out is {file}; expected a name that ends in {' or '.join(_SUFFIXES)}")
    if file.exists():
        raise UsageError(f"{file} exists already; name another file, or delete it")


def write_recipe(draft: Draft, file: Path) -> None:
    """Write the recipe to `file`.

    Raises
    ------
    PqkvError
        If it cannot be written.
    """
    write_text(file, draft.text)


def _preface(recipe: Recipe, shape: ModelGeometry) -> str:
    coded = sum(not layer.dense_reason for layer in shape.layers)
    dense = sorted({layer.dense_reason for layer in shape.layers if layer.dense_reason})
    positions = f", {shape.max_positions:,} positions" if shape.max_positions else ""
    plain = shape.cache_bytes_per_token()
    lines = [
        f"{recipe.name}: {shape.model_type}{positions}; {coded} of {len(shape.layers)} layers are quantized.",
        f"Their cache takes {plain:,} bytes per token in bf16, {plain * recipe.codebooks.bits / _BF16_BITS:,.0f} as codes.",
        *(f"Left as they are: {reason}." for reason in dense),
        "Text like what the model will read calibrates best: give your own as calibration.data.",
    ]
    return "".join(f"# {line}\n" for line in lines)
