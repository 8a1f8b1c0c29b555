"""What `update` returns: a stand-in for keys or values that costs no memory until someone computes with it.

The `pqkv` attention function reads the codes through it. Any other attention function meets an ordinary operation first,
which decodes everything: slow, correct, counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from pqkv_cli.errors import CacheError
from pqkv_kernels.reference.attention import ExactTokens

if TYPE_CHECKING:
    from pqkv_cli.cache.layer import QuantizedLayer
    from pqkv_cli.specs import Side
    from pqkv_kernels.format.addresses import Slabs


@dataclass(frozen=True, slots=True)
class StepView:
    """One layer's cache as the queries of one step see it: pages of codes, exact sinks, and exact tokens.

    Attributes
    ----------
    pages
        Code pages of ``keys`` and ``values``, each slabs [B, P, Hkv, page_bytes].
    sinks
        Exact sinks of ``keys`` and ``values``, [B, Hkv, S, D]; they count where their slot is below the row's `stop`.
    exact
        Exact ``keys`` and ``values`` of the slots from `first_exact` on, the step's own included, [B, Hkv, T, D]; they count
        from the row's `stop` on.
    stop
        Slot behind the last that each row reads as code, [B] int64: at least `first_exact`, at most `num_coded` where a row has
        any codes.
    newest
        In a captured step of one query: which of `exact` is its own token, [1] int64; those behind it are not there yet.
    """

    layer: QuantizedLayer
    step: int
    num_coded: int
    first_exact: int
    pages: dict[Side, Slabs]
    sinks: dict[Side, torch.Tensor]
    exact: dict[Side, torch.Tensor]
    stop: torch.Tensor
    newest: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        """All slots visible in this step."""
        return self.first_exact + self.exact["keys"].shape[2]

    def exact_tokens(self, starts: torch.Tensor) -> ExactTokens:
        """Return what rows that start at `starts` [B] read exact."""
        sinks, recent = ((held["keys"], held["values"]) for held in (self.sinks, self.exact))
        return ExactTokens(sinks, recent, starts, self.stop, self.first_exact, self.newest)

    def check_fresh(self) -> None:
        """Refuse to be read after a later step.

        Raises
        ------
        CacheError
            If the layer was updated since.
        """
        if self.step != self.layer.num_updates:
            raise CacheError(
                f"keys and values of update {self.step} are read after update {self.layer.num_updates}; "
                "they are valid until the layer's next update: copy them with .clone() if they are needed longer"
            )


class LazyStates(torch.Tensor):
    """Keys or values [B, Hkv, T, D] of one step that decode themselves on first use in an operation."""

    step_view: StepView
    side: Side

    @staticmethod
    def __new__(cls, view: StepView, side: Side) -> LazyStates:
        """Make a handle on `side` of `view`."""
        exact = view.exact[side]
        shape = (*exact.shape[:2], view.num_slots, exact.shape[3])
        make = torch.Tensor._make_wrapper_subclass
        handle: LazyStates = make(cls, shape, dtype=exact.dtype, device=exact.device)
        handle.step_view, handle.side = view, side
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        """Return a description that does not decode."""
        return f"LazyStates({self.side}, shape={list(self.shape)}, dtype={self.dtype})"

    def materialize(self) -> torch.Tensor:
        """Return the decoded keys or values, [B, Hkv, T, D] in the handle's dtype."""
        self.step_view.check_fresh()
        return self.step_view.layer.materialize(self.step_view, self.side)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Decode every handle among the arguments and run the operation on plain tensors."""

        def plain(x: Any) -> Any:
            return x.materialize() if isinstance(x, LazyStates) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
