"""Result records of a comparison. Knows the record's form; measures nothing."""

from collections.abc import Sequence
from typing import Any

from pqkv_cli.evaluation.peers import Contestant, metrics
from pqkv_cli.evaluation.record import SCHEMA, circumstances, model_facts
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject

TASK = "perplexity"
MODE: Mode = "all"


def peer_records(
    subject: Subject, settings: EvaluationSettings, contestants: Sequence[Contestant], num_tokens: int
) -> list[dict[str, Any]]:
    """Return one record (``pqkv.result/1``) per contestant; `method` names it, ``native_bits`` is its rate.

    A contestant that could not be fitted or gave no finite logits has the status ``unavailable`` and an ``error``.
    """
    return [_record(subject, settings, contestant, num_tokens) for contestant in contestants]


def _record(subject: Subject, settings: EvaluationSettings, own: Contestant, num_tokens: int) -> dict[str, Any]:
    failed = bool(own.failures)
    return {
        "schema": SCHEMA,
        "task": TASK,
        "mode": MODE,
        "method": own.method,
        "native_bits": own.native_bits,
        "at_rest": own.at_rest,
        "status": "unavailable" if failed else "complete",
        **({"error": own.failures[0]} if failed else {}),
        "model": model_facts(subject),
        "artifact_sha256": own.artifact_sha256,
        "bits_per_channel": {} if failed else own.bits(),
        "table_bytes": own.table_bytes,
        "cache_bytes": {"baseline": 0, "quantized": 0, "num_tokens": 0},
        "metrics": {} if failed else metrics(own.parts, settings.seed),
        "cost": {"fit_seconds": own.fit_seconds},
        **circumstances(subject, settings, num_tokens),
    }
