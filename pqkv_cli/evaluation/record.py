"""What all result records (``pqkv.result/1``) have in common. Knows the record's form; measures nothing."""

from dataclasses import asdict
from typing import Any

from pqkv_cli.evaluation.environment import environment
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject

SCHEMA = "pqkv.result/1"


def model_facts(subject: Subject) -> dict[str, Any]:
    """Return the record's ``model``."""
    model = subject.artifact.header.model
    return {"id": model.label, "revision": None, "config_sha256": model.config_sha256}


def circumstances(subject: Subject, settings: EvaluationSettings, num_tokens: int) -> dict[str, Any]:
    """Return the record's ``settings`` and ``environment``."""
    measured = {"num_tokens": num_tokens, "dtype": str(subject.model.dtype).removeprefix("torch.")}
    return {"settings": asdict(settings) | measured, "environment": environment(subject.model.device)}
