"""Measures the speed of a run's artifact on this machine: attention alone, and whole decode steps. Parses no arguments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.benchmarks.step_speed import TokenTimes, time_tokens
from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.record import environment
from pqkv_cli.files import write_text
from pqkv_cli.pipeline.loading import device_of, open_model
from pqkv_cli.pipeline.rundir import BENCH_FILE
from pqkv_cli.pipeline.start import Source
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.attach import Attached, attach
from pqkv_cli.specs import SIDES
from pqkv_kernels.bench import AttentionTimes, copy_bandwidth, time_attention
from pqkv_kernels.dispatch import BackendRequest
from pqkv_kernels.errors import KernelError


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What to measure; empty contexts or batches mean the usual ones of the device."""

    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    repeats: int = 20
    backend: BackendRequest = "auto"


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured, and where."""

    backend: str
    reason: str
    attention: tuple[AttentionTimes, ...]
    tokens: tuple[TokenTimes, ...]
    environment: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        return {
            "schema": "pqkv.bench/1",
            "backend": {"name": self.backend, "reason": self.reason},
            "attention": [times.row() for times in self.attention],
            "tokens": [times.row() for times in self.tokens],
            "environment": self.environment,
        }


def bench(source: Source, settings: BenchSettings, reporter: Reporter, *, force: bool = False) -> BenchReport:
    """Measure; every backend passes its correctness gate before it is timed.

    Raises
    ------
    RunError
        If the gate is not passed, or no layer is coded.
    CacheError
        If the backend asked for cannot run here.
    """
    artifact = open_artifact(source.artifact, device_of(source.recipe))
    model, _ = open_model(source.recipe, reporter)
    on_gpu = model.device.type == "cuda"
    contexts = settings.contexts or ((1024, 8192, 32768, 131072) if on_gpu else (1024, 4096, 16384))
    batches = settings.batches or ((1, 8) if on_gpu else (1,))
    with attach(model, artifact, force=force, backend=settings.backend) as attached:
        with reporter.progress("attention") as advance:
            attention = _attention_times(attached, artifact, contexts, batches, settings.repeats, advance)
        with reporter.progress("tokens") as advance:
            tokens = []
            for index, context in enumerate(contexts):
                tokens.append(time_tokens(attached, context, settings.repeats))
                advance(index + 1, len(contexts))
        choice = attached.backend
    report = BenchReport(choice.name, choice.reason, tuple(attention), tuple(tokens), environment(model.device))
    # Beside the other results, where a report finds it.
    write_text(source.results / BENCH_FILE, json.dumps(report.document(), indent=1) + "\n", RunError)
    return report


def _attention_times(
    attached: Attached, artifact: Artifact, contexts: Sequence[int], batches: Sequence[int], repeats: int, advance: Any
) -> list[AttentionTimes]:
    """Time the first coded layer's format at every context and batch."""
    tables = next((t for t in artifact.tables if t is not None), None)
    if tables is None:
        raise RunError("no layer of this artifact is coded; there is nothing to measure")
    config, device = attached.model.config.get_text_config(), torch.device(attached.model.device)
    keys, values = (tables[side].to(device) for side in SIDES)
    found: list[AttentionTimes] = []
    bandwidth = copy_bandwidth(device)
    for batch in batches:
        for context in contexts:
            try:
                times = time_attention(
                    keys,
                    values,
                    group_size=config.num_attention_heads // keys.num_heads,
                    batch=batch,
                    context=context,
                    backend=attached.backend.name,
                    dtype=attached.model.dtype,
                    repeats=repeats,
                    copy_gb_per_s=bandwidth,
                )
            except KernelError as error:
                raise RunError(str(error)) from error
            found.append(times)
            advance(len(found), len(batches) * len(contexts))
    return found
