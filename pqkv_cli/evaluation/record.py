"""Result records: what a task measured, of what, and where (versions, device, revision). Knows no tasks."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.evaluation.settings import EvaluationSettings, Subject


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the device of this process, and the git revision of the code where there is one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass(frozen=True, slots=True)
class BitsPerChannel:
    """Bits per cached channel and token, by what they are spent on; `asymptotic` counts codes alone.

    `cache_bytes` are the bytes of a cache of `num_tokens` tokens, uncompressed (`baseline`, in the model's dtype) and as
    held (`quantized`); zero where nothing was held. `num_read_as_codes` tokens were read as codes in the last step of the cache
    that read most of them; None where that is not counted (mode `all` reads every token as a code).
    """

    codes: float
    exact_tokens: float
    positions: float
    asymptotic: float
    num_tokens: int = 0
    cache_bytes: Mapping[str, int] = field(default_factory=lambda: {"baseline": 0, "quantized": 0})
    num_read_as_codes: int | None = None

    def document(self) -> dict[str, float]:
        """Return the record's ``bits_per_channel``."""
        return {
            "total": self.codes + self.exact_tokens + self.positions,
            "codes": self.codes,
            "scales": 0.0,
            "exact_tokens": self.exact_tokens,
            "positions": self.positions,
            "asymptotic": self.asymptotic,
        }


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Metrics of one task in one mode; `num_tokens` were looked at.

    `headline` names the metrics that stand for the task; `failed` the samples that have none, with the reason; `notes` is
    what a reader of the result must know, `mode` the one measured in where that is not the one asked for.
    """

    metrics: Mapping[str, Any]
    bits: BitsPerChannel
    num_tokens: int
    cost: Mapping[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None


SCHEMA = "pqkv.result/1"


def model_facts(subject: Subject) -> dict[str, Any]:
    """Return the record's ``model``."""
    model = subject.artifact.header.model
    return {"id": model.label, "revision": None, "config_sha256": model.config_sha256}


def circumstances(subject: Subject, settings: EvaluationSettings, num_tokens: int) -> dict[str, Any]:
    """Return the record's ``settings`` and ``environment``."""
    measured = {"num_tokens": num_tokens, "dtype": str(subject.model.dtype).removeprefix("torch.")}
    return {"settings": asdict(settings) | measured, "environment": environment(subject.model.device)}
