"""The encoding of one flush: what left a layer's window becomes pages in room made for them, whenever it is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pqkv_cli.cache.drift import LayerDrift
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.angles import Angles
from pqkv_kernels.dispatch import Backend, encode_pages
from pqkv_kernels.tables import CodecTables

_TOKENS = 4096  # encoded at a time; whole pages


@dataclass(frozen=True, slots=True, eq=False)
class PageJob:
    """Holds everything it reads, so that nothing it depends on can change or go before it is called.

    Attributes
    ----------
    states
        What left the window, [B, Hkv, 64 * P, D] in model space.
    angles
        ``(cos, sin)`` of its slots where the codec works before rotary embedding.
    room
        Where its pages belong: parts of slabs that take `P` pages together.
    first_slot, text_start
        For `drift`, as `LayerDrift.observe` takes them.
    """

    backend: Backend
    tables: Mapping[Side, CodecTables]
    states: Mapping[Side, torch.Tensor]
    angles: Mapping[Side, Angles | None]
    room: Mapping[Side, Sequence[torch.Tensor]]
    drift: LayerDrift | None
    first_slot: int
    text_start: torch.Tensor

    def __call__(self) -> None:
        """Encode keys and values, and write their pages."""
        for side in SIDES:
            states, tables, angles = self.states[side], self.tables[side], self.angles[side]
            pages = self._pages(side)
            if self.drift is not None:
                self.drift.observe(side, states, pages, tables, angles, self.first_slot, self.text_start)
            for part in self.room[side]:
                part.copy_(pages[:, : part.shape[1]], non_blocking=True)
                pages = pages[:, part.shape[1] :]

    def _pages(self, side: Side) -> torch.Tensor:
        """Encode some tokens at a time: what encoding holds beside its result stays small beside a long prompt's states."""
        states, angles = self.states[side], self.angles[side]
        made: list[torch.Tensor] = []
        for start in range(0, states.shape[2], _TOKENS):
            part = slice(start, start + _TOKENS)
            turn = None if angles is None else (angles[0][:, part].contiguous(), angles[1][:, part].contiguous())
            made.append(encode_pages(self.backend, states[:, :, part], self.tables[side], turn))
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)
