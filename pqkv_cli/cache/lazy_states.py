"""What `update` returns: a stand-in for keys or values that costs no memory until someone computes with it.

The `pqkv` attention function reads the codes through it. Any other attention function meets an ordinary operation first,
which decodes everything: slow, correct, counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from pqkv_cli.cache.positions import MaskCheck
from pqkv_cli.errors import CacheError
from pqkv_cli.specs import Side
from pqkv_kernels.dispatch import BackendName
from pqkv_kernels.format.addresses import PageBlocks
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens


class UpdateCounter:
    """How many updates a layer has had: a snapshot is valid until the next one."""

    def __init__(self) -> None:
        self.count = 0


@dataclass(frozen=True, slots=True, eq=False)
class LayerSnapshot:
    """One layer's cache as the queries of one step see it; the drawing in `pqkv_cli.cache.layer` shows its slots.

    Attributes
    ----------
    backend, tables
        What attends to the codes of ``keys`` and ``values``, and what they stand for.
    row_start, coded_stop
        First real slot of each row, and the slot behind the last that it reads as code, [B] int64.
    num_coded, pages
        Slots that pages hold, and the pages of ``keys`` and ``values`` in page blocks [B, P, Hkv, page_bytes].
    angles
        Rotary angles of the pages, where keys are coded before rotary embedding.
    sinks
        Exact sinks of ``keys`` and ``values``, [B, Hkv, S, D].
    first_exact, exact
        First slot of the window, and exact ``keys`` and ``values`` from there on, the step's own included, [B, Hkv, T, D].
    newest
        In a captured step of one query: which of `exact` is its own token, [1] int64; those behind it are not there yet.
    mask_check
        Which attention mask of the step was found to be causal already.
    decode
        Returns all keys or values of the snapshot decoded.
    updates, update
        The layer's counter, and what it stood at when the snapshot was made.
    """

    backend: BackendName
    tables: Mapping[Side, CodecTables]
    row_start: torch.Tensor
    coded_stop: torch.Tensor
    num_coded: int
    pages: Mapping[Side, PageBlocks]
    angles: Angles | PageAngles | None
    sinks: Mapping[Side, torch.Tensor]
    first_exact: int
    exact: Mapping[Side, torch.Tensor]
    newest: torch.Tensor | None
    mask_check: MaskCheck
    decode: Callable[[LayerSnapshot, Side], torch.Tensor]
    updates: UpdateCounter
    update: int

    @property
    def num_slots(self) -> int:
        """All slots visible in this step."""
        return self.first_exact + self.exact["keys"].shape[2]

    def coded_tokens(self) -> CodedTokens:
        """Return what the rows read as codes: each the slots behind its sinks and before its window."""
        spans = torch.stack((self.row_start + self.sinks["keys"].shape[2], self.coded_stop), dim=1)
        pages, tables = self.pages, self.tables
        return CodedTokens(pages["keys"], pages["values"], tables["keys"], tables["values"], spans, self.angles)

    def exact_tokens(self) -> ExactTokens:
        """Return what the rows read exact."""
        sinks, recent = ((held["keys"], held["values"]) for held in (self.sinks, self.exact))
        return ExactTokens(sinks, recent, self.row_start, self.coded_stop, self.first_exact, self.newest)

    def check_fresh(self) -> None:
        """Refuse to be read after a later step.

        Raises
        ------
        CacheError
            If the layer was updated since.
        """
        if self.update != self.updates.count:
            raise CacheError(
                f"keys and values of update {self.update} are read after update {self.updates.count}; "
                "they are valid until the layer's next update: copy them with .clone() if they are needed longer"
            )


class LazyStates(torch.Tensor):
    """Keys or values [B, Hkv, T, D] of one step that decode themselves on first use in an operation."""

    snapshot: LayerSnapshot
    side: Side

    @staticmethod
    def __new__(cls, snapshot: LayerSnapshot, side: Side) -> LazyStates:
        """Make a handle on `side` of `snapshot`."""
        exact = snapshot.exact[side]
        shape = (*exact.shape[:2], snapshot.num_slots, exact.shape[3])
        make = torch.Tensor._make_wrapper_subclass
        handle: LazyStates = make(cls, shape, dtype=exact.dtype, device=exact.device)
        handle.snapshot, handle.side = snapshot, side
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        """Return a description that does not decode."""
        return f"LazyStates({self.side}, shape={list(self.shape)}, dtype={self.dtype})"

    def materialize(self) -> torch.Tensor:
        """Return the decoded keys or values, [B, Hkv, T, D] in the handle's dtype."""
        self.snapshot.check_fresh()
        return self.snapshot.decode(self.snapshot, self.side)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Decode every handle among the arguments and run the operation on plain tensors."""

        def plain(x: Any) -> Any:
            return x.materialize() if isinstance(x, LazyStates) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
