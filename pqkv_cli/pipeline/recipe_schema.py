"""The recipe as a JSON schema, for editors: what each setting means, and which values it takes. Opens no files."""

from collections.abc import Mapping
from typing import Any

from pqkv_cli.rates import RATES
from pqkv_cli.recipe import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"

# What an editor shows beside each setting. Every setting has a row; a test holds this table against the recipe.
MEANINGS: Mapping[str, str] = {
    "name": "Name of the recipe; its run is kept in runs/NAME.",
    "model": "Model directory, GGUF file, org/name hub id, or 'demo'.",
    "dtype": "Dtype of the weights; auto takes the checkpoint's, but float32 on a CPU where that is quicker.",
    "device": "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N; changes nothing that is kept.",
    "seed": "Seed of everything random.",
    "calibration.data": "Text like what will be read: a file, stdlib:broad, hf:ORG/NAME, self (of the model), or a list.",
    "calibration.samples": "Text windows that go through the model.",
    "calibration.seq_len": "Tokens of a window.",
    "calibration.batch_size": "Windows that go through the model at once.",
    "calibration.reservoir_size": "Vectors kept per layer and head to learn codebooks from.",
    "calibration.recall_share": "Share of the windows in which numbers are hidden and asked for.",
    "calibration.fisher": "Backward passes per batch that measure what errors of keys and values cost; 0 leaves it out.",
    "codebooks.allocation": "measured: every layer's keys and values get the rate that helps most; uniform: all get the same.",
    "codebooks.bits": "Bits of code per channel; the mean over all layers where the allocation is measured.",
    "codebooks.profile": "quality: tables of up to 1,024 entries; speed: of 16 entries and their sums, and no prototypes.",
    "codebooks.prototype_bits": "Bits of the code of the whole vector, out of --bits; null is what the profile has: 10 or 0.",
    "codebooks.key_space": "Where keys with rotary embedding are coded: before it, after it, or what costs least by layer.",
    "codebooks.iterations": "Most rounds of k-means.",
    "codebooks.refine": "Refine codebooks on all of the calibration text, if held-out divergence falls by it.",
    "cache.num_sinks": "First tokens of a row that stay exact.",
    "cache.window_tokens": "Most recent tokens that stay exact.",
    "evaluation.tasks": "Tasks: perplexity, kld, passkey, needle, lines, longbench, or any of lm-evaluation-harness.",
    "evaluation.data": "Text to evaluate on, disjoint from calibration: a file (text or rows), stdlib:evaluation, hf:ORG/NAME.",
    "evaluation.modes": "all (every token quantized) and cache (as in use).",
    "evaluation.context": "Tokens of an evaluation window; null leaves it to the task.",
    "evaluation.limit": "Most examples of a task; null takes all.",
    "evaluation.prompts": "Pass keys per length and depth, before limit; null leaves it to limit.",
    "evaluation.max_new_tokens": "Tokens of a continuation, where the task leaves it open.",
    "evaluation.stride": "Text windows begin so many tokens apart, and their last so many count; null: disjoint, all count.",
    "evaluation.gates": "What the results must reach, such as perplexity.kl_bits<=0.02; decides the exit code.",
    "generation.prompt": "What `pqkv run` continues at its end.",
    "generation.max_new_tokens": "Tokens of that continuation.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file.

    It accepts what `recipe.parse_recipe` accepts, except that gates which contradict each other are found only there.
    """
    schema = Recipe.model_json_schema()
    sections = schema.pop("$defs")
    for name, field in list(schema["properties"].items()):
        if "$ref" in field:
            section = sections[field["$ref"].rsplit("/", 1)[-1]]
            section["properties"] = {key: _described(inner, f"{name}.{key}") for key, inner in section["properties"].items()}
            schema["properties"][name] = _without_title(section)
        else:
            schema["properties"][name] = _described(field, name)
    schema["properties"]["codebooks"]["properties"]["bits"]["enum"] = sorted(RATES, reverse=True)
    about = "A recipe of pqkv: a model and every setting of the pipeline."
    return {"$schema": DRAFT, **schema, "title": "pqkv recipe", "description": about}


def settings(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return every setting of a recipe's `schema` by its dotted name."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, field in schema["properties"].items():
        inner = field.get("properties")
        found |= {name: field} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return found


def _described(field: dict[str, Any], name: str) -> dict[str, Any]:
    meaning = MEANINGS.get(name)
    return _without_title(field) | ({"description": meaning} if meaning else {})


def _without_title(field: dict[str, Any]) -> dict[str, Any]:
    """Return `field` without what pydantic makes of its Python name; a section keeps the first line of its docstring."""
    kept = {key: value for key, value in field.items() if key != "title"}
    if "description" in kept:
        kept["description"] = str(kept["description"]).split("\n")[0]
    return kept
