"""A recipe: a model and every setting of the pipeline, as strict YAML. Knows no stages and no torch."""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pqkv_cli.errors import RecipeError, UsageError, did_you_mean
from pqkv_cli.gates import parse_gates
from pqkv_cli.rates import CodeStyle, Profile, rate_names
from pqkv_cli.recipe_faults import describe_faults
from pqkv_cli.recipe_sources import Sources
from pqkv_cli.strict_yaml import read_yaml

TaskName = Literal["perplexity", "passkey", "needle", "lines", "kld", "kld_generated", "longbench"]
ModeName = Literal["all", "cache"]


def _consistent(gates: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_gates(gates)
    except UsageError as error:
        raise ValueError(str(error)) from error  # the kind that pydantic collects
    return gates


_TASK = r"^[\w.+-]+$"


def _written_rate(bits: float) -> int | float:
    return int(bits) if bits == int(bits) else bits


_DEVICE = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CalibrationRecipe(_Section):
    """Which texts are run through the model, in what share of them numbers are hidden and asked for, and how much is kept.

    `fisher` is the number of backward passes per batch that measure what errors of keys and values cost; 0 leaves it out.
    """

    data: Sources = ("self", "stdlib:broad")
    samples: int = Field(32, ge=2)
    seq_len: int = Field(1024, ge=8)
    batch_size: int = Field(1, ge=1)
    reservoir_size: int = Field(24576, ge=1)
    recall_share: float = Field(0.125, ge=0, le=1)
    fisher: int = Field(0, ge=0)


class CodebookRecipe(_Section):
    """The code rate (bits per channel), where its bits go, how many of a vector's go to its prototype, and the fit's effort.

    With `allocation` ``measured``, `bits` is the mean over all keys and values, and each layer's get the rate that helps most;
    with ``uniform`` it is the rate of all of them. Profile ``speed`` has tables of 16 entries, and no prototypes unless asked.
    `key_space` is where keys with rotary embedding are coded; ``measured`` tries both in every layer.
    """

    allocation: Literal["measured", "uniform"] = "measured"
    profile: Profile = "quality"
    bits: Annotated[float, PlainSerializer(_written_rate)] = 4
    prototype_bits: Literal[0, 8, 10] | None = None
    key_space: Literal["pre_rope", "post_rope", "measured"] = "pre_rope"
    iterations: int = Field(10, ge=1)
    refine: bool = False

    @field_validator("bits")
    @classmethod
    def _known_rate(cls, bits: float, info: ValidationInfo) -> float:
        rates = CodeStyle(info.data.get("profile", "quality")).rates
        if info.data.get("allocation") == "uniform" and bits not in rates:
            raise ValueError(f"found {bits:g}; expected one of {rate_names(rates)} where the allocation is uniform")
        if not min(rates) <= bits <= max(rates):
            raise ValueError(f"found {bits:g}; expected {min(rates):g} to {max(rates):g}")
        return bits


class CacheRecipe(_Section):
    """Tokens kept exact: the first ones of a row and the most recent ones."""

    num_sinks: int = Field(4, ge=0)
    window_tokens: int = Field(64, ge=0)


class EvaluationRecipe(_Section):
    """What is measured: tasks of ours (`TaskName`) or of lm-evaluation-harness.

    `context` (tokens, the longest of them for pass keys), `limit` (text windows, or pass keys per length and depth) and
    `prompts` (pass keys alone, before `limit`) are the task's own choice where they are None, and so is `max_new_tokens`
    (tasks that generate and leave it open). With a `stride` text windows overlap: they begin so many tokens apart, and only the
    last so many tokens of each are scored. `gates` are what the results must reach, such as ``perplexity.kl_bits<=0.02``; they
    decide the exit code and change no result.
    """

    tasks: Annotated[tuple[Annotated[str, Field(pattern=_TASK)], ...], Field(strict=False, min_length=1)] = (
        "perplexity",
        "passkey",
    )
    data: str = Field("stdlib:evaluation", min_length=1)
    modes: Annotated[tuple[ModeName, ...], Field(strict=False, min_length=1)] = ("all", "cache")
    context: int | None = Field(None, ge=8)
    limit: int | None = Field(None, ge=1)
    prompts: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    stride: int | None = Field(None, ge=1)
    gates: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_consistent)] = ()


class GenerationRecipe(_Section):
    """What `pqkv run` continues at its end."""

    prompt: str = Field("Once upon a time", min_length=1)
    max_new_tokens: int = Field(64, ge=1)


class Recipe(_Section):
    """Everything the pipeline needs to know. `model` is a directory, a GGUF file, ``demo`` or an ``org/name`` hub id."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")
    model: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", pattern=_DEVICE)
    seed: int = Field(0, ge=0, lt=2**63)
    calibration: CalibrationRecipe = CalibrationRecipe()
    codebooks: CodebookRecipe = CodebookRecipe()
    cache: CacheRecipe = CacheRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    generation: GenerationRecipe = GenerationRecipe()


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe that `text` describes; `source` names it in errors.

    Raises
    ------
    RecipeError
        With all faults of the text at once.
    """
    try:
        data, duplicates = read_yaml(text)
    except ValueError as error:
        raise RecipeError(source, [f"not readable as YAML: {error}"]) from error
    if not isinstance(data, dict):
        raise RecipeError(source, [f"found {type(data).__name__}, expected keys with values such as 'model: ...'"])
    return _validate(data, source, duplicates)


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in the file `path`.

    Raises
    ------
    RecipeError
        If the file is no valid recipe.
    UsageError
        If it cannot be read.
    """
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {error}") from error


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with pqkv, sorted."""
    entries = resources.files("pqkv_recipes").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml")))


def named_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises
    ------
    UsageError
        If there is none, with the nearest name.
    """
    names = recipe_names()
    if name not in names:
        raise UsageError(f"there is no recipe {name!r}{did_you_mean(name, names)}; known are {', '.join(names)}")
    return parse_recipe((resources.files("pqkv_recipes") / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}")


def override(recipe: Recipe, changes: Mapping[str, object], source: str = "the recipe with these options") -> Recipe:
    """Return `recipe` with `changes` (dotted keys such as ``calibration.samples``; None leaves a value as it is).

    `source` names the changes in errors.

    Raises
    ------
    RecipeError
        If a key is unknown or a value not allowed.
    """
    data = recipe.model_dump()
    for dotted, value in changes.items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        inner = data
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return _validate(data, source)


def dump_recipe(recipe: Recipe) -> str:
    """Return the YAML of `recipe`, every setting written out."""
    data = recipe.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def recipe_hash(recipe: Recipe) -> str:
    """Return the sha256 of what decides an artifact.

    Left out are paths, devices, and what only happens to a finished artifact (evaluation, generation). Model and text are
    identified by their content elsewhere, so moving a file changes nothing.
    """
    data = recipe.model_dump(mode="json", include={"dtype", "seed", "calibration", "codebooks", "cache"})
    del data["calibration"]["data"]
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _validate(data: dict[str, Any], source: str, faults: tuple[str, ...] | list[str] = ()) -> Recipe:
    found = list(faults)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found += describe_faults(error, Recipe)
    if found:
        raise RecipeError(source, found)
    return recipe
