"""Measures kernel configurations for an artifact on this machine's GPU and writes the winners beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.errors import RunError
from pqkv_cli.evaluation.record import environment
from pqkv_cli.files import write_text
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.tuned import SCHEMA, kernels_file, tables_format
from pqkv_cli.specs import SIDES
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.config import DecodeConfig
from pqkv_kernels.tuning import Measured, Trial, candidates, config_document, measurer, tune

_CONTEXT, _REPEATS = 32768, 20
Measurer = Callable[[CodecTables, CodecTables, int], Callable[[DecodeConfig], Measured]]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was written, and the winner of every code format."""

    path: Path
    device: str
    winners: dict[str, DecodeConfig]


def require_gpu() -> torch.device:
    """Return the GPU to tune on.

    Raises
    ------
    RunError
        If there is none.
    """
    if not torch.cuda.is_available():
        raise RunError(
            "--tune measures kernels on a GPU, and torch finds none here; leave it out (the shipped table of kernel "
            "configurations serves), or run `pqkv export RUN --tune` on the machine that will generate"
        )
    return torch.device("cuda", torch.cuda.current_device())


def tune_artifact(directory: Path, reporter: Reporter) -> Tuned:
    """Measure every code format of the artifact in `directory` on the present GPU and write ``kernels.<gpu>.json``.

    Raises
    ------
    RunError
        If there is no GPU, or no configuration gives right answers there.
    ArtifactError
        If the artifact cannot be read.
    """
    device = require_gpu()
    artifact = open_artifact(directory, str(device))
    name = torch.cuda.get_device_name(device)

    def on_gpu(keys: CodecTables, values: CodecTables, group: int) -> Callable[[DecodeConfig], Measured]:
        return measurer(keys.to(device), values.to(device), group, 1, _CONTEXT, torch.bfloat16, _REPEATS)

    return write_tuned(artifact, directory, name, on_gpu, environment(device), reporter)


def write_tuned(
    artifact: Artifact,
    directory: Path,
    device_name: str,
    measure: Measurer,
    where: dict[str, Any],
    reporter: Reporter,
) -> Tuned:
    """Tune with `measure` and write the winners for the device `device_name`.

    Raises
    ------
    RunError
        If no configuration of some format gives right answers.
    """
    found: dict[str, tuple[DecodeConfig, list[Trial]]] = {}
    with reporter.progress("tune") as advance:
        for index, tables in enumerate(artifact.tables):
            if tables is not None and tables_format(tables) not in found:
                keys, values = (tables[side] for side in SIDES)
                group = artifact.header.geometry[index].group_size
                first = candidates(looked_up=keys.rotary is None and group == 1)
                try:
                    found[tables_format(tables)] = tune(first, measure(keys, values, group), device_name)
                except KernelError as error:
                    raise RunError(f"layer {index}: {error}") from error
            advance(index + 1, len(artifact.tables))
    document = {
        "schema": SCHEMA,
        "device": device_name,
        "context": _CONTEXT,
        "formats": [_entry(name, *result) for name, result in found.items()],
        "environment": where,
    }
    path = kernels_file(directory, device_name)
    write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n", RunError)
    return Tuned(path, device_name, {name: config for name, (config, _) in found.items()})


def _entry(name: str, winner: DecodeConfig, trials: list[Trial]) -> dict[str, Any]:
    tried = [
        {"config": config_document(t.config), "ms": t.ms, "error": t.error, "fault": t.fault}
        for t in sorted(trials, key=lambda t: float("inf") if t.ms is None else t.ms)
    ]
    return {"format": name, "config": config_document(winner), "tried": tried}
