"""A recipe that goes through every stage of ``pqkv run`` in a second or two, and what such a run must end with."""

import json
import random
from pathlib import Path
from typing import Any

from tiny_chain import byte_tokenizer, tiny_llama

_WORDS = "once upon a time there was small red house on the hill and old man who liked to read about far lands".split()
# What depends on the speed of the machine, and nothing else may.
_MEASURED = frozenset({"seconds", "cost", "peak_bytes"})


# Vectors kept: at least as many as the largest codebook has entries, which with measured allocation is that of 10 bits.
_KEPT = {"uniform": 512, "measured": 1100}


def make_recipe(directory: Path, allocation: str = "uniform") -> Path:
    """Write a tiny model, two texts and a recipe for them to `directory`; return the recipe's file.

    The calibration has three parts, the fit two layers, the evaluation two modes of three windows. With `allocation`
    ``measured`` every layer is fitted at every rate first, which takes four times as long.
    """
    model = directory / "tiny-llama"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    texts = {name: directory / f"{name}.txt" for name in ("calibration", "evaluation")}
    for seed, path in enumerate(texts.values()):
        path.write_text(" ".join(random.Random(seed).choices(_WORDS, k=4000)), encoding="utf-8")
    recipe = directory / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\nmodel: {model}\n"
        f"calibration: {{data: {texts['calibration']}, samples: 80, seq_len: 128, batch_size: 16, "
        f"reservoir_size: {_KEPT[allocation]}}}\n"
        f"codebooks: {{allocation: {allocation}, iterations: 2, prototype_bits: 8}}\n"
        "cache: {num_sinks: 2, window_tokens: 8}\n"
        f"evaluation: {{tasks: [perplexity], data: {texts['evaluation']}, limit: 3, context: 160}}\n"
        "generation: {prompt: once upon, max_new_tokens: 2}\n",
        encoding="utf-8",
    )
    return recipe


def contents(run: Path) -> dict[str, bytes]:
    """Return what the run at `run` holds: every file's bytes, those of JSON without what was measured of time and memory."""
    files = [path for path in run.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(run)): _content(path) for path in sorted(files)}


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    is_measured = path.name == "stages.json" or "results" in path.parts
    if is_measured and path.suffix == ".json":
        return _steady(json.loads(data))
    if is_measured and path.suffix == ".jsonl":
        return b"\n".join(_steady(json.loads(line)) for line in data.splitlines())
    return data


def _steady(value: Any) -> bytes:
    return json.dumps(_without_measurements(value), sort_keys=True).encode()


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measurements(inner) for key, inner in value.items() if key not in _MEASURED}
    return [_without_measurements(inner) for inner in value] if isinstance(value, list) else value
