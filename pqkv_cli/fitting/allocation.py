"""Which rate every layer's keys and values get: short fits at the rates around a budget, what errors cost, the best choice.

The choice is an integer program: one candidate per side of a layer, the least total loss, bytes within the budget, and few
different codecs, because every codec is a kernel of its own. Losses of different layers are taken to add up, as they do while
they are small. Bytes of tables have a price in loss: what as many bytes of codes of a long text would save.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pqkv_cli.artifact.schema import MAX_CODECS
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.errors import RunError, UsageError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.gradient_costs import LayerSide, gradient_costs
from pqkv_cli.fitting.layer_file import make_directory
from pqkv_cli.fitting.plan import KeySpaces, check_codable, codec_name, rated_plan, rated_specs
from pqkv_cli.fitting.run import layer_request
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.side_by_side import side_by_side
from pqkv_cli.fitting.trial import Trial, load_trial, save_trial, try_layer
from pqkv_cli.models.geometry import num_positions
from pqkv_cli.rates import TABLE_NUMBER_BYTES, CodeStyle
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import SIDES, CacheSpec, CodecSpec, CompressionPlan, ModelGeometry, Side
from pqkv_kernels.format.layout import PAGE_TOKENS

# The gap to the optimum at which the solver stops: far below what losses are known to.
RELATIVE_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to code a side of a layer: its codec and rate, bytes of codes of one page of tokens and of tables, the loss."""

    codec: str
    bits: float
    page_bytes: int
    table_bytes: int
    loss: float


def allocate(
    sides: Sequence[Sequence[Candidate]], budget_bytes: float, max_codecs: int = MAX_CODECS, byte_price: float = 0.0
) -> tuple[Candidate, ...]:
    """Return one candidate for each side, of the least total loss and price of tables under the budget.

    Parameters
    ----------
    sides
        The candidates of each side of each layer; at least one each.
    budget_bytes
        Bytes of codes that one page of tokens may take in all of them together.
    max_codecs
        How many different codecs may be chosen.
    byte_price
        Loss that one byte of tables is worth.

    Raises
    ------
    UsageError
        If no choice stays within the budget; with the least that any takes.
    RunError
        If the solver fails.
    """
    flat = [candidate for side in sides for candidate in side]
    names = sorted({candidate.codec for candidate in flat})
    least = sum(min(candidate.page_bytes for candidate in side) for side in sides)
    if least > budget_bytes:
        raise UsageError(f"the budget is {budget_bytes:g} bytes of codes per page; expected at least {least}; raise --budget")
    costs = [candidate.loss + byte_price * candidate.table_bytes for candidate in flat]
    scale = max(*costs, 1e-30)
    result = milp(
        np.array([cost / scale for cost in costs] + [0.0] * len(names)),
        constraints=_constraints(sides, names, budget_bytes, max_codecs),
        integrality=np.ones(len(flat) + len(names)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if result.x is None:
        raise RunError(
            f"no allocation of bits was found ({result.message}); expected one with at most {max_codecs} codecs; "
            "allow another budget, or choose one rate for all with --bits"
        )
    return _chosen(sides, result.x)


def _constraints(
    sides: Sequence[Sequence[Candidate]], names: Sequence[str], budget_bytes: float, max_codecs: int
) -> LinearConstraint:
    """Return the rows over candidates and codecs: one choice per side, the budget, which codecs are in use, how many."""
    flat = [candidate for side in sides for candidate in side]
    width = len(flat) + len(names)
    rows, low, high = [], [], []

    def add(row: np.ndarray, least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    start = 0
    for side in sides:
        one = np.zeros(width)
        one[start : start + len(side)] = 1
        add(one, 1, 1)
        start += len(side)
    add(np.array([candidate.page_bytes for candidate in flat] + [0] * len(names), dtype=float), 0, budget_bytes)
    for index, name in enumerate(names):
        users = np.array([candidate.codec == name for candidate in flat])
        used = np.zeros(width)
        used[: len(flat)][users], used[len(flat) + index] = 1, -users.sum()
        add(used, -np.inf, 0)
    add(np.array([0] * len(flat) + [1] * len(names), dtype=float), 0, max_codecs)
    return LinearConstraint(np.array(rows), np.array(low), np.array(high))


def _chosen(sides: Sequence[Sequence[Candidate]], values: np.ndarray) -> tuple[Candidate, ...]:
    chosen, start = [], 0
    for side in sides:
        chosen.append(side[int(values[start : start + len(side)].argmax())])
        start += len(side)
    return tuple(chosen)


SCHEMA = "pqkv.allocation/1"
ALLOCATION_FILE = "allocation.json"

# Rates worth trying: no side does with less than half the budget's mean or gains much from this many bits more.
LEAST_SHARE = 2
MOST_MORE = 1.5
# Tables are paid over as many tokens as the model has positions, and at least over so many: all texts of a batch share them.
LEAST_TABLE_TOKENS = 32_768
# Held-out windows that tell what errors cost: the ratios between layers, which is all that counts, are steady after a few.
MOST_WINDOWS = 8


class Allocation:
    """Finds the plan of the least loss whose codes take `bits` per channel and token on average.

    Each side of each layer is fitted shortly at the rates around it. What its errors cost is estimated once, as the KL
    divergence on the calibration's held-out windows (`gradient_costs`), at the rate nearest to `bits` that leaves errors to
    speak of; at other rates it is taken to grow with the squared error, as it does in the metric space. Trials of finished
    layers are kept.

    Parameters
    ----------
    geometry
        The model's layers.
    bits
        Mean bits of code per channel and token.
    style
        What codes are made of.
    settings
        How the codebooks will be fitted; trials take a share of its rounds.
    spaces
        Where keys of rotary layers are coded.
    num_vectors
        How many vectors a trial is fitted to (`num_trial_vectors`).
    trials
        Directory in which finished trials are kept.
    record
        File that says how the plan came about.

    Raises
    ------
    UsageError
        If no choice of rates has this mean; with the range that can be had.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        bits: float,
        style: CodeStyle,
        settings: FitSettings,
        *,
        spaces: KeySpaces,
        num_vectors: int,
        trials: Path,
        record: Path,
    ) -> None:
        check_codable(geometry)
        self._geometry, self._settings = geometry, settings
        self._directory, self._record = trials, record
        self._bits, self._style, self._spaces = bits, style, spaces
        self._menus = _menus(geometry, bits, style, num_vectors, spaces)

    def plan(self, model: Any, store: CalibrationStore, cache: CacheSpec, reporter: Reporter) -> CompressionPlan:
        """Return the plan, and write down how it came about; `store` has the keys in the spaces in which they are coded.

        Raises
        ------
        DataError
            If samples cannot be fitted.
        RunError
            If files cannot be written.
        """
        trials = self._trials(store, reporter)
        losses = _losses(model, store, trials, reporter)
        bases = {(index, side): trials[index].error(side, trials[index].tables[side][0]) for index, side in self._menus}
        slopes = _slopes(bases, losses)
        candidates = [self._candidates(index, side, trials[index], slopes[index, side]) for index, side in self._menus]
        layers = [self._geometry.layers[index] for index, _ in self._menus]
        channels = sum(layer.num_kv_heads * layer.head_dim for layer in layers)
        budget = self._bits * channels * PAGE_TOKENS / 8
        least = sum(candidate.loss for candidate in allocate(candidates, budget))
        price = byte_price_at(least, channels, max(LEAST_TABLE_TOKENS, num_positions(model.config)))
        chosen = dict(zip(self._menus, allocate(candidates, budget, byte_price=price), strict=True))
        _write(self._record, self._bits, losses, chosen)
        return rated_plan(self._geometry, lambda index, side: chosen[index, side].bits, cache, self._style, self._spaces)

    def _candidates(self, index: int, side: Side, trial: Trial, slope: float) -> list[Candidate]:
        return [
            Candidate(
                codec_name(self._geometry, index, side, rate, self._spaces.get(index, "pre_rope")),
                rate,
                self._geometry.layers[index].num_kv_heads * spec.layout.page_bytes,
                self._geometry.layers[index].num_kv_heads * _table_numbers(spec) * TABLE_NUMBER_BYTES,
                slope * trial.error(side, spec),
            )
            for rate, spec in self._menus[index, side].items()
        ]

    def _trials(self, store: CalibrationStore, reporter: Reporter) -> dict[int, Trial]:
        """Return the trials of all coded layers; what earlier trials hold is not tried again."""
        coded = sorted({index for index, _ in self._menus})
        make_directory(self._directory)
        with reporter.progress("try rates") as advance:
            trials = side_by_side(partial(self._trial, store), coded, self._geometry, advance)
        return dict(zip(coded, trials, strict=True))

    def _trial(self, store: CalibrationStore, index: int) -> Trial:
        menus = {side: self._menus[index, side] for side in SIDES}
        samples, layer = store.layer(index), self._geometry.layers[index]
        request = layer_request(index, layer, "trial", self._settings, samples)
        trial = load_trial(self._directory, index, menus, request)
        if not trial.answers(menus, self._bits):
            trial = try_layer(samples, layer, menus, self._bits, index=index, settings=self._settings, known=trial)
            save_trial(self._directory, index, trial, request)
        return trial


def _menus(
    geometry: ModelGeometry, bits: float, style: CodeStyle, num_vectors: int, spaces: KeySpaces
) -> dict[LayerSide, Mapping[float, CodecSpec]]:
    """Return the formats of every side that is coded, by rate around `bits`; no tables with more entries than vectors.

    Raises
    ------
    UsageError
        If `bits` is out of their range.
    """
    menus: dict[LayerSide, Mapping[float, CodecSpec]] = {
        (index, side): _few_entries(rated_specs(layer, side, style, spaces.get(index, "pre_rope")), num_vectors)
        for index, layer in enumerate(geometry.layers)
        if not layer.dense_reason
        for side in SIDES
    }
    if not all(menus.values()):
        widths = sorted({layer.head_dim for layer in geometry.layers if not layer.dense_reason})
        raise UsageError(
            f"no rate fits heads of {widths} channels and {num_vectors} calibration vectors; expected an even number, and at "
            "least a vector per table entry; calibrate on more text, or choose another model"
        )
    least, most = max(min(menu) for menu in menus.values()), min(max(menu) for menu in menus.values())
    if not least <= bits <= most:
        raise UsageError(
            f"--budget is {bits:g}; expected {least:g} to {most:g} bits per channel, what this model's heads and {num_vectors} "
            "calibration vectors allow; choose another budget, or calibrate on more text"
        )
    return {
        layer_side: {rate: spec for rate, spec in menu.items() if bits / LEAST_SHARE <= rate <= bits + MOST_MORE}
        for layer_side, menu in menus.items()
    }


def byte_price_at(loss: float, channels: int, num_tokens: int) -> float:
    """Return the loss that a byte of tables is worth where codes of `channels` channels per token lose `loss` at their best.

    One more bit of code per channel divides squared errors, and so the loss, by about four: a byte more per token saves
    ``ln 4 * 8 * loss / channels``. A byte of tables is paid once for `num_tokens`.
    """
    return log(4) * 8 * loss / channels / num_tokens


def _losses(model: Any, store: CalibrationStore, trials: Mapping[int, Trial], reporter: Reporter) -> dict[LayerSide, float]:
    """Return the KL divergence in bits per token that one side alone would cause at its base rate, for each."""
    tables = {(index, side): trial.tables[side][1] for index, trial in trials.items() for side in SIDES}
    with reporter.progress("measure costs") as advance:
        return gradient_costs(model, store.held_out()[:MOST_WINDOWS], tables, advance)


def _slopes(errors: Mapping[LayerSide, float], losses: Mapping[LayerSide, float]) -> dict[LayerSide, float]:
    """Return what a relative error of one would cost each side; the usual price where a side was coded without any error."""
    known = {layer_side: losses[layer_side] / error for layer_side, error in errors.items() if error > 0}
    usual = median(known.values()) if known else 1.0
    return {layer_side: known.get(layer_side, usual) for layer_side in errors}


def _few_entries(specs: Mapping[float, CodecSpec], most: int) -> dict[float, CodecSpec]:
    """Return those of `specs` no table of which has more than `most` entries."""
    return {rate: spec for rate, spec in specs.items() if _entries(spec) <= most}


def _table_numbers(spec: CodecSpec) -> int:
    return spec.layout.table_numbers + (spec.layout.head_dim**2 if spec.predicted else 0)


def _entries(spec: CodecSpec) -> int:
    return max(group.num_centroids for stage in spec.layout.stages for group in stage)


def _write(path: Path, bits: float, losses: Mapping[LayerSide, float], chosen: Mapping[LayerSide, Candidate]) -> None:
    entries = [
        {
            "layer": index,
            "side": side,
            "kl_bits_alone": losses[index, side],
            "codec": candidate.codec,
            "bits": candidate.bits,
            "predicted_kl_bits": candidate.loss,
            "table_bytes": candidate.table_bytes,
        }
        for (index, side), candidate in chosen.items()
    ]
    document = {"schema": SCHEMA, "budget": bits, "places": entries}
    write_text(path, json.dumps(document, indent=1) + "\n")
