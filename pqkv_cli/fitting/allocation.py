"""Which rate every layer's keys and values get, from what each would cost at each. Knows numbers alone: no tensors, no files.

The choice is an integer program: one candidate per side of a layer, the least total loss, bytes within the budget, and few
different codecs, because every codec is a kernel of its own. Losses of different layers are taken to add up, as they do while
they are small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pqkv_cli.errors import RunError, UsageError

MAX_CODECS = 6
# The gap to the optimum at which the solver stops: far below what losses are known to.
RELATIVE_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to code a side of a layer: its codec and rate, the bytes of codes of one page of tokens, and the loss."""

    codec: str
    bits: float
    page_bytes: int
    loss: float


def allocate(sides: Sequence[Sequence[Candidate]], budget_bytes: float, max_codecs: int = MAX_CODECS) -> tuple[Candidate, ...]:
    """Return one candidate for each side, of the least total loss under the budget.

    Parameters
    ----------
    sides
        The candidates of each side of each layer; at least one each.
    budget_bytes
        Bytes of codes that one page of tokens may take in all of them together.
    max_codecs
        How many different codecs may be chosen.

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
    scale = max(max(candidate.loss for candidate in flat), 1e-30)
    result = milp(
        np.array([candidate.loss / scale for candidate in flat] + [0.0] * len(names)),
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
