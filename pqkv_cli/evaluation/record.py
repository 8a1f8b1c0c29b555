"""Result records: what a task measured, of what, where (versions, device, revision), and with how many bits of cache."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.tables import CodecTables

# The method of records of pqkv itself, and how comparisons and timings call its side.
OURS = "pqkv"


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


def codec_bits(artifact: Artifact) -> BitsPerChannel:
    """Return the bits of mode `all`: codes and nothing else."""
    codes = _asymptotic([tables[side] for tables in artifact.tables if tables for side in SIDES])
    return BitsPerChannel(codes=codes, exact_tokens=0.0, positions=0.0, asymptotic=codes)


def cache_bits(cache: QuantizedCache) -> BitsPerChannel:
    """Return the bits of the quantized layers of a filled `cache`, from the bytes of the tensors it holds."""
    layers = cache.quantized_layers
    held = cache.num_bytes()
    windows = [layer.window[side] for layer in layers for side in SIDES]
    num_tokens = cache.get_seq_length()
    channels = sum(w.shape[0] * w.shape[1] * w.shape[3] for w in windows) * num_tokens
    return BitsPerChannel(
        codes=8 * held.codes / channels,
        exact_tokens=8 * held.exact / channels,
        positions=8 * held.positions / channels,
        asymptotic=_asymptotic([layer.tables[side] for layer in layers for side in SIDES]),
        num_tokens=num_tokens,
        cache_bytes={"baseline": channels * windows[0].element_size(), "quantized": held.total - held.dense},
        num_read_as_codes=num_read_as_codes(cache),
    )


def num_read_as_codes(cache: QuantizedCache) -> int:
    """Return how many tokens of all rows the newest step of `cache` read as codes; each layer reads the same ones."""
    slots = cache.slots
    if slots.coded_stop is None:
        return 0
    sinks = min((layer.spec.num_sinks for layer in cache.quantized_layers), default=0)
    return int((slots.stops() - slots.starts() - sinks).clamp(min=0).sum())


def _asymptotic(tables: Sequence[CodecTables]) -> float:
    channels = [t.num_heads * t.layout.head_dim for t in tables]
    return fmean([t.layout.bits_per_channel for t in tables], weights=channels)


def fullest_bits(held: Sequence[Mapping[str, Any] | None], artifact: Artifact) -> BitsPerChannel:
    """Return the bits of the fullest cache among those `held` (their fields as plain data), or of the codes where none was."""
    found = [BitsPerChannel(**fields) for fields in held if fields]
    if not found:
        return codec_bits(artifact)
    read = max((bits.num_read_as_codes for bits in found if bits.num_read_as_codes is not None), default=None)
    return replace(max(found, key=lambda bits: bits.num_tokens), num_read_as_codes=read)
