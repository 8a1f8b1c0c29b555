import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.errors import UsageError
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.evaluation.tasks import TASKS, run_task

# What other tools rely on: more may be added, these stay.
KEYS: dict[str, Any] = {
    "": "schema task mode method status model artifact_sha256 bits_per_channel table_bytes cache_bytes metrics cost settings "
    "environment",
    "model": "id revision config_sha256",
    "bits_per_channel": "total codes scales exact_tokens asymptotic",
    "cache_bytes": "baseline quantized",
    "settings": "seed limit context",
    "environment": "python torch device git",
}


@pytest.mark.parametrize("mode", ["all", "cache"])
@pytest.mark.parametrize("task", TASKS)
def test_a_record_has_every_key_and_is_json(task: str, mode: str, subject: Callable[..., Subject], tmp_path: Path) -> None:
    row = {"dataset": "lcc", "prompt": "import os\nNext line of code:\n", "answers": ["import sys"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    made = replace(subject(), data=tmp_path) if task == "longbench" else subject()
    context = 900 if task == "lines" else 256  # in bytes its instructions are long
    settings = EvaluationSettings(mode, context=context, limit=1, max_new_tokens=32)  # type: ignore[arg-type]
    record = run_task(task, made, settings, lambda done, total: None)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for name, keys in KEYS.items():
        assert set(keys.split()) - set(record[name] if name else record) == set(), name
    assert (record["schema"], record["task"], record["mode"]) == ("pqkv.result/1", task, mode)
    assert (record["method"], record["status"]) == ("pqkv", "complete")
    assert record["artifact_sha256"] == made.artifact.sha256
    assert record["table_bytes"] == made.artifact.table_bytes > 0
    assert (record["cache_bytes"]["quantized"] > 0) == (mode == "cache")
    assert record["settings"].items() >= {"seed": 0, "limit": 1, "context": context, "dtype": "float32"}.items()


def test_perplexity_carries_its_metrics(subject: Callable[..., Subject]) -> None:
    settings = EvaluationSettings("all", context=64, limit=2)
    metrics = run_task("perplexity", subject(), settings, lambda done, total: None)["metrics"]
    assert {name: set(values) for name, values in metrics.items() if name != "by_context"} == {
        "kl_bits": {"quantized", "p99", "p99_9", "ci95"},
        "top1_agreement": {"quantized", "ci95"},
        "top5_agreement": {"quantized", "ci95"},
        "perplexity": {"baseline", "quantized", "recovery", "ci95"},
    }


def test_an_unknown_task_is_named_with_the_nearest(subject: Callable[..., Subject]) -> None:
    with pytest.raises(UsageError, match=r"no task 'perplexty' \(did you mean 'perplexity'\?\); known are perplexity, passkey"):
        run_task("perplexty", subject(), EvaluationSettings("all", context=64), lambda done, total: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "cahe"}, r"mode is 'cahe'; expected one of all, cache \(did you mean 'cache'\?\)"),
        ({"context": 1}, "context is 1; expected at least 2"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; expected at least 1"),
        ({"position_offset": -1}, "position_offset is -1; expected at least 0"),
    ],
)
def test_impossible_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluationSettings(**{"mode": "all", "context": 64} | fields)
