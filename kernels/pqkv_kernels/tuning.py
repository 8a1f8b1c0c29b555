"""Which launch parameters of decode attention are fastest here: measures candidates and keeps what passed its gate.

Knows candidates and how to choose among measurements. Nothing is tuned unless it is asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from pqkv_kernels.bench import GATE_ERROR, bench_inputs, gate_inputs, measure, relative_error
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.config import DecodeConfig, KeyScores
from pqkv_kernels.reference.attention import code_attention, code_queries

Measured = tuple[float, float]
"""Error against the reference, relative to the answer, and milliseconds."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: its error and its time, or why it has none."""

    config: DecodeConfig
    error: float | None = None
    ms: float | None = None
    fault: str | None = None


def candidates(*, looked_up: bool = False) -> tuple[DecodeConfig, ...]:
    """Return what is tried first; `looked_up` where scores may come from tables."""
    ways: tuple[KeyScores, ...] = ("decode", "table") if looked_up else ("decode",)
    return tuple(
        DecodeConfig(num_warps=warps, max_registers=registers, key_scores=way, origin="candidate")
        for way in ways
        for warps in (1, 2, 4)
        for registers in (0, 168, 128)
    )


def tune(
    first: Iterable[DecodeConfig], measured: Callable[[DecodeConfig], Measured], device: str
) -> tuple[DecodeConfig, list[Trial]]:
    """Return the fastest configuration and all trials: warps and registers first, then how finely the cache is split.

    Parameters
    ----------
    first
        Candidates, see `candidates`.
    measured
        Measures one; raises where it cannot run.
    device
        The device's name, for the winner's `origin`.

    Raises
    ------
    KernelError
        If no candidate runs and gives right answers.
    """
    trials = [_tried(config, measured) for config in first]
    winner = _fastest(trials)
    finer = [replace(winner.config, programs_per_processor=n) for n in (6, 12, 24) if n != winner.config.programs_per_processor]
    trials += [_tried(config, measured) for config in finer]
    winner = _fastest(trials)
    return replace(winner.config, origin=f"measured on {device}: {winner.ms:.4f} ms"), trials


def config_document(config: DecodeConfig) -> dict[str, Any]:
    """Return `config` as JSON can hold it."""
    return asdict(config)


def read_config(document: Any) -> DecodeConfig:
    """Return the configuration of a `config_document`.

    Raises
    ------
    KernelError
        If it is not one.
    """
    names = {f.name for f in fields(DecodeConfig)}
    if not isinstance(document, dict) or not set(document) <= names:
        raise KernelError(f"a kernel configuration is {document!r}; expected an object of {', '.join(sorted(names))}")
    wrong = {n: v for n, v in document.items() if type(v) is not type(getattr(DecodeConfig(), n))}
    if wrong:
        raise KernelError(f"a kernel configuration has {wrong}; expected the types of {config_document(DecodeConfig())}")
    return DecodeConfig(**document)


def format_name(keys: CodeLayout, values: CodeLayout) -> str:
    """Return a name of what a configuration is tuned for, e.g. ``1x10x64,32x8x2/32x8x2``."""

    def name(layout: CodeLayout) -> str:
        stages = (["x".join(map(str, (g.num_subspaces, g.nbits, g.subspace_dim))) for g in s] for s in layout.stages)
        return ",".join("+".join(stage) for stage in stages)

    return f"{name(keys)}/{name(values)}"


def measurer(
    keys: CodecTables, values: CodecTables, group_size: int, batch: int, context: int, dtype: torch.dtype, repeats: int
) -> Callable[[DecodeConfig], Measured]:
    """Return what measures a configuration of the Triton kernels on the device of the tables."""
    from pqkv_kernels.gpu.attention import triton_attention

    scaling = keys.layout.head_dim**-0.5
    query, inner = gate_inputs(keys, values, group_size, dtype)
    small = code_queries(query, keys)
    query, whole = bench_inputs(keys, values, group_size, batch, context, dtype)
    large = code_queries(query, keys)
    expected, _ = code_attention(small, inner, scaling)

    def measured(config: DecodeConfig) -> Measured:
        found, _ = triton_attention(small, inner, scaling, config=config)
        error = relative_error(found, expected)
        if not error <= GATE_ERROR:
            return error, float("inf")

        def step() -> None:
            triton_attention(large, whole, scaling, config=config)

        return error, measure((step,), repeats, query.device)[0].p50

    return measured


def _tried(config: DecodeConfig, measured: Callable[[DecodeConfig], Measured]) -> Trial:
    try:
        error, ms = measured(config)
    except Exception as fault:  # a candidate may ask for more registers or memory than there are: whatever it raises
        return Trial(config, fault=f"{type(fault).__name__}: {fault}"[:200])
    if not error <= GATE_ERROR:
        return Trial(config, error, fault=f"differs from the reference by {error:.3g}; expected at most {GATE_ERROR}")
    return Trial(config, error, ms)


def _fastest(trials: list[Trial]) -> Trial:
    timed = [(trial.ms, i) for i, trial in enumerate(trials) if trial.ms is not None]
    if not timed:
        faults = "; ".join(sorted({trial.fault or "" for trial in trials}))
        raise KernelError(f"none of {len(trials)} kernel configurations runs and gives right answers: {faults}")
    return trials[min(timed)[1]]
