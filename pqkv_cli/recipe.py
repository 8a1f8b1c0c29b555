"""A recipe: a model and every setting of the pipeline. Knows no stages, no files and no torch.

A setting is declared in one line, its type and default with what it means, which stages depend on it and how a command line
gives it (`Setting`). Stages, options, the schema for editors and the page of recipes take it from there.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import reduce
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo

from pqkv_cli.errors import UsageError
from pqkv_cli.gates import parse_gates
from pqkv_cli.rates import CodeStyle, Profile, rate_names
from pqkv_cli.setting import Setting, Stage
from pqkv_cli.specs import CacheSpec, KeyMap, ValueMap, map_words

TaskName = Literal["perplexity", "passkey", "needle", "lines", "kld", "kld_generated", "longbench"]
ModeName = Literal["all", "cache"]


def _consistent(gates: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_gates(gates)
    except UsageError as error:
        raise ValueError(str(error)) from error  # the kind that pydantic collects
    return gates


def _not_removed(key_space: object) -> object:
    if key_space == "measured":
        raise ValueError(
            "found 'measured', which was removed: wherever it was measured, every layer chose pre_rope; expected 'pre_rope', "
            "or 'post_rope' to code keys after rotary embedding"
        )
    return key_space


def _several(found: object) -> tuple[str, ...]:
    """Return the sources of a text, of which one alone may stand without a list."""
    sources = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise ValueError(f"found {found!r}, expected text that is not empty, or a list of such texts")
    if len(set(sources)) < len(sources):
        raise ValueError(f"found {found!r}, expected every text once: each gets an equal share of the windows")
    return tuple(map(str, sources))


def _written_sources(sources: tuple[str, ...]) -> str | list[str]:
    return sources[0] if len(sources) == 1 else list(sources)


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}
Sources = Annotated[
    tuple[str, ...],
    BeforeValidator(_several),
    PlainSerializer(_written_sources),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS]}),
]

_TASK = r"^[\w.+-]+$"


def _written_rate(bits: float) -> int | float:
    return int(bits) if bits == int(bits) else bits


_DEVICE = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
_FIT: Stage = "fit-codebooks"
_MODELS = ("run", "generate", "bench")  # verbs that are no stage, and open a model


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CalibrationRecipe(_Section):
    """Which texts are run through the model, in what share of them numbers are hidden and asked for, and how much is kept."""

    data: Annotated[
        Sources,
        Setting(
            "Text to calibrate on: a file of text or rows, stdlib:broad, hf:ORG/NAME, or self, which the model writes.",
            stage="calibrate",
            by_content=True,
            option="--data",
            also=("run",),
            metavar="FILE",
        ),
    ] = ("self", "stdlib:broad")
    samples: Annotated[int, Field(ge=2), Setting("Number of text windows.", "calibrate", "--samples")] = 32
    seq_len: Annotated[int, Field(ge=8), Setting("Tokens of a window.", "calibrate", "--seq-len")] = 1024
    batch_size: Annotated[
        int, Field(ge=1), Setting("Windows that go through the model at once.", "calibrate", "--batch-size")
    ] = 1
    reservoir_size: Annotated[
        int,
        Field(ge=1),
        Setting("Vectors kept per layer and head to learn codebooks from.", "calibrate", "--reservoir-size"),
    ] = 24576
    recall_share: Annotated[
        float,
        Field(ge=0, le=1),
        Setting("Share of the windows in which numbers are hidden and asked for.", "calibrate", "--recall-share"),
    ] = 0.125
    fisher: Annotated[
        int,
        Field(ge=0),
        Setting(
            "Measure by backward passes what errors of keys and values cost; a recipe says how many per batch, 0 for none.",
            "calibrate",
            "--fisher/--no-fisher",
        ),
    ] = 0


class CodebookRecipe(_Section):
    """The code rate (bits per channel), where its bits go, how many of a vector's go to its prototype, and the fit's effort.

    With `allocation` ``measured``, `bits` is the mean over all keys and values, and each layer's get the rate that helps most;
    with ``uniform`` it is the rate of all of them. The options ``--budget`` and ``--bits`` set both.
    """

    allocation: Annotated[
        Literal["measured", "uniform"],
        Setting("measured: every layer's keys and values get the rate that helps most; uniform: all get the same.", _FIT),
    ] = "measured"
    profile: Annotated[
        Profile,
        Setting(
            "quality: tables of up to 1,024 entries; speed: of 16 entries and their sums, and no prototypes unless asked for.",
            _FIT,
            "--profile",
        ),
    ] = "quality"
    bits: Annotated[
        float,
        PlainSerializer(_written_rate),
        Setting("Bits of code per channel; the mean over all layers where the allocation is measured.", _FIT),
    ] = 4
    prototype_bits: Annotated[
        Literal[0, 8, 10] | None,
        Setting(
            "Bits of the code of the whole vector: 10, 8 or 0; unless given 8, and 0 in profile speed.",
            _FIT,
            "--prototype-bits",
            metavar="N",
        ),
    ] = None
    key_space: Annotated[
        Literal["pre_rope", "post_rope"],
        BeforeValidator(_not_removed),
        Setting("Code keys before rotary embedding (pre_rope) or after it (post_rope).", _FIT, "--key-space"),
    ] = "pre_rope"
    key_map: Annotated[KeyMap | None, Setting(map_words("keys"), _FIT, came_later=True)] = None
    value_map: Annotated[ValueMap | None, Setting(map_words("values"), _FIT, came_later=True)] = None
    predict_values: Annotated[
        bool, Setting("Predict values from the decoded keys of their tokens, and code only the rest.", _FIT, came_later=True)
    ] = False
    iterations: Annotated[int, Field(ge=1), Setting("Most rounds of k-means.", _FIT, "--iterations")] = 10
    refine: Annotated[
        bool,
        Setting(
            "Refine codebooks on all of the calibration text, if that brings the model closer.", _FIT, "--refine/--no-refine"
        ),
    ] = False

    @property
    def style(self) -> CodeStyle:
        """What codes are made of."""
        return CodeStyle(self.profile, self.prototype_bits, self.key_map, self.value_map, self.predict_values)

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

    num_sinks: Annotated[int, Field(ge=0), Setting("First tokens of a row that stay exact.", "export", "--num-sinks")] = 4
    window_tokens: Annotated[int, Field(ge=0), Setting("Most recent tokens that stay exact.", "export", "--window-tokens")] = 64

    @property
    def spec(self) -> CacheSpec:
        """What stays exact, as the cache knows it."""
        return CacheSpec(self.num_sinks, self.window_tokens)


class EvaluationRecipe(_Section):
    """What is measured: tasks of ours (`TaskName`) or of lm-evaluation-harness.

    Sizes that are None are the task's own choice. `gates` decide the exit code and change no result.
    """

    tasks: Annotated[
        tuple[Annotated[str, Field(pattern=_TASK)], ...],
        Field(strict=False, min_length=1),
        Setting(
            "perplexity, kld, passkey, needle, lines, longbench, or any task of lm-evaluation-harness.",
            "eval",
            "--task",
            offers=get_args(TaskName),
        ),
    ] = ("perplexity", "passkey")
    data: Annotated[
        str,
        Field(min_length=1),
        Setting(
            "Text not calibrated on: a file of text, stdlib:evaluation, hf:ORG/NAME, or rows (*.jsonl, their folder).",
            stage="eval",
            by_content=True,
            option="--data",
            metavar="PATH",
        ),
    ] = "stdlib:evaluation"
    modes: Annotated[
        tuple[ModeName, ...],
        Field(strict=False, min_length=1),
        Setting("all (every token quantized) or cache (as in use).", "eval", "--mode"),
    ] = ("all", "cache")
    context: Annotated[
        int | None, Field(ge=8), Setting("Tokens of an evaluation window, or the most of a prompt.", "eval", "--context")
    ] = None
    stride: Annotated[
        int | None,
        Field(ge=1),
        Setting("Text windows begin so many tokens apart; their last so many are scored.", "eval", "--stride"),
    ] = None
    limit: Annotated[int | None, Field(ge=1), Setting("At most this many examples of a task.", "eval", "--limit")] = None
    prompts: Annotated[
        int | None,
        Field(ge=1),
        Setting("Pass keys per length and depth, where limit is for the other tasks; null takes limit.", "eval"),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Field(ge=1),
        Setting("Tokens of a continuation, where the task leaves it open.", "eval", "--max-new-tokens"),
    ] = None
    gates: Annotated[
        tuple[str, ...],
        Field(strict=False),
        AfterValidator(_consistent),
        Setting(
            "Fail (exit code 3) unless the results hold it, such as 'perplexity.kl_bits<=0.02'.",
            stage=(),
            option="--gate",
            also=("eval",),
            metavar="GATE",
        ),
    ] = ()


class GenerationRecipe(_Section):
    """What `pqkv run` continues at its end."""

    prompt: Annotated[str, Field(min_length=1), Setting("What `pqkv run` continues at its end.", ())] = "Once upon a time"
    max_new_tokens: Annotated[
        int, Field(ge=1), Setting("How many tokens to write.", (), "--max-new-tokens", also=("generate",))
    ] = 64


class Recipe(_Section):
    """Everything the pipeline needs to know. `model` is a directory, a GGUF file, ``demo`` or an ``org/name`` hub id."""

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$"), Setting("Name of the recipe; its run is kept in runs/NAME.", ())
    ]
    model: Annotated[
        str,
        Field(min_length=1),
        Setting("Model directory, GGUF file, org/name hub id, or 'demo'.", "calibrate", by_content=True),
    ]
    seed: Annotated[
        int,
        Field(ge=0, lt=2**63),
        Setting("Seed of everything random.", ("calibrate", "fit-codebooks", "eval"), "--seed", also=("run", "generate")),
    ] = 0
    device: Annotated[
        str,
        Field(pattern=_DEVICE),
        Setting(
            "Where the model runs: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N.",
            stage=(),
            option="--device",
            also=("calibrate", "fit-codebooks", "eval", *_MODELS),
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Setting(
            "Dtype of the weights: auto, float32, bfloat16 or float16. On a CPU auto takes float32 where a half is slower.",
            ("calibrate", "eval"),
            "--dtype",
            also=_MODELS,
        ),
    ] = "auto"
    calibration: CalibrationRecipe = CalibrationRecipe()
    codebooks: CodebookRecipe = CodebookRecipe()
    cache: CacheRecipe = CacheRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    generation: GenerationRecipe = GenerationRecipe()


def setting_fields(model: type[BaseModel] = Recipe) -> dict[str, FieldInfo]:
    """Return the fields of a recipe that are settings, by dotted names such as ``calibration.samples``, in its order."""
    return dict(_walk(model, ""))


def settings(model: type[BaseModel] = Recipe) -> dict[str, Setting]:
    """Return what a recipe declares of its settings, by dotted names such as ``calibration.samples``, in its order.

    Raises
    ------
    TypeError
        If a field has no `Setting`, or several.
    """
    found = {}
    for name, field in setting_fields(model).items():
        declared = [each for each in field.metadata if isinstance(each, Setting)]
        if len(declared) != 1:
            raise TypeError(f"{name} has {len(declared)} of `Setting` beside its type; expected one, as every setting has")
        found[name] = declared[0]
    return found


def came_later(recipe: Recipe) -> set[str]:
    """Return the names of the settings that came later and have their default: what is hashed of `recipe` lacks them."""
    kind = type(recipe)
    fields = setting_fields(kind)
    later = {name for name, setting in settings(kind).items() if setting.came_later}
    return {name for name in later if reduce(getattr, name.split("."), recipe) == fields[name].default}


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def recipe_hash(recipe: Recipe) -> str:
    """Return the sha256 of what decides an artifact.

    Left out are paths, devices, and what only happens to a finished artifact (evaluation, generation). Model and text are
    identified by their content elsewhere, so moving a file changes nothing.
    """
    data = recipe.model_dump(mode="json", include={"dtype", "seed", "calibration", "codebooks", "cache"})
    for name in ("calibration.data", *came_later(recipe)):
        section, _, key = name.rpartition(".")
        (data.get(section, {}) if section else data).pop(key, None)
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
