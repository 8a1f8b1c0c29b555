"""The tokens that attention reads of one layer: coded ones in pages, and exact ones. Data only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the tokens: output [..., D] fp32 and log-sum-exp [...] fp32; parts merge to the whole."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedTokens:
    """Pages of codes, what they stand for, and which of their slots count. All of them precede all queries.

    Attributes
    ----------
    key_pages, value_pages
        Page blocks in order, each [B, P, Hkv, page_bytes] uint8; those of keys and values have equal B, P and Hkv.
    keys, values
        The tables of both codecs.
    spans
        First slot of each row that counts and the one behind the last that does, [B, 2] int64. A row may have none; both may
        lie outside ``0 .. 64 * num_pages``.
    angles
        Where ``keys.rotary`` is set: ``(cos, sin)`` [B, 64 * num_pages, rotary_dim / 2] fp32, or those of whole pages.
    """

    key_pages: Sequence[torch.Tensor]
    value_pages: Sequence[torch.Tensor]
    keys: CodecTables
    values: CodecTables
    spans: torch.Tensor
    angles: Angles | PageAngles | None = None

    @property
    def num_pages(self) -> int:
        """Pages of every row and head."""
        return sum(block.shape[1] for block in self.key_pages)


@dataclass(frozen=True, slots=True, eq=False)
class ExactTokens:
    """Keys and values in model space of the tokens that rows read exact.

    Attributes
    ----------
    sinks
        Keys and values of each row's first real tokens, [B, Hkv, S, D] each; they count where their slot
        is below the row's stop.
    recent
        Keys and values of the slots from `first_slot` on, [B, Hkv, T, D] each; they count from the row's stop on. The last ones
        are the queries' own.
    starts, stops
        First real slot of each row and the slot behind the last that it reads as code, [B] int64.
    newest
        Which of `recent` is the token of the only query, [1] int64, where those behind it are not there yet.
    """

    sinks: tuple[torch.Tensor, torch.Tensor]
    recent: tuple[torch.Tensor, torch.Tensor]
    starts: torch.Tensor
    stops: torch.Tensor
    first_slot: int
    newest: torch.Tensor | None = None

    def query_slots(self, num_queries: int) -> torch.Tensor:
        """Return the slots of the queries, [Tq] int64."""
        if self.newest is not None:
            return self.first_slot + self.newest
        end = self.first_slot + self.recent[0].shape[2]
        return torch.arange(end - num_queries, end, device=self.starts.device)
