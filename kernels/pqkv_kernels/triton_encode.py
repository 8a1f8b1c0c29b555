"""Turns vectors into packed codes on a GPU: checks, layouts and launches the kernels. Sums are fp32, addresses int64."""

from typing import Any

import torch
import triton

from pqkv_kernels.angles import Angles
from pqkv_kernels.channel_tables import channel_tables
from pqkv_kernels.checks import check_angles
from pqkv_kernels.errors import KernelError
from pqkv_kernels.joint import joint_layout
from pqkv_kernels.layout import PAGE_TOKENS, TRIED_PROTOTYPES, CodeGroup
from pqkv_kernels.packing import pack_known
from pqkv_kernels.tables import CodecTables
from pqkv_kernels.triton_choose import error_kernel, few_kernel
from pqkv_kernels.triton_codes import encode_kernel

_BLOCK_CENTROIDS = 32
_MOST_SHARES = 4  # stages that the kernel packs one joint code to
_LEAST_DOT = 16  # no side of a matrix product on tensor cores is shorter


def triton_encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode as `pqkv_kernels.codec.encode` does; arguments are checked already."""
    if tables.map is not None and tables.map.ndim == 3:
        x = x.float() @ tables.map.mT
    job = _Job(x, tables, angles)
    if job.pages.numel():
        chosen = job.choose_prototypes() if job.layout.has_prototypes else None
        for stage, i, group, _, channel in job.layout.spans():
            if stage or chosen is None:
                job.encode(group, stage, i, channel, chosen)
    return job.pages


class _Job:
    """Vectors [B, Hkv, T, D] in memory order of their own, and the pages their codes go to."""

    def __init__(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> None:
        self.x, self.tables = x, tables
        self.batch, self.heads, self.tokens, self.dim = x.shape
        self.num_pages = self.tokens // PAGE_TOKENS
        self._joint = joint_layout(tables.layout)
        self.layout, self._codebooks = self._joint.layout, self._joint.codebooks(tables.codebooks)
        page_bytes = tables.layout.page_bytes
        self.pages = torch.empty(self.batch, self.num_pages, self.heads, page_bytes, dtype=torch.uint8, device=x.device)
        channels = channel_tables(tables)
        additive = len(self.layout.stages) > 1 and not self.layout.has_prototypes
        self.residual = torch.empty(x.shape, device=x.device) if additive and x.numel() else x
        cos, sin = (x, x) if angles is None else (t.contiguous() for t in angles)
        self._vectors = (x, channels.places, channels.factors, cos, sin)
        self._sizes = (
            *(self.heads, self.num_pages),
            0 if tables.rotary is None else tables.rotary.num_pairs,
            self.tokens if angles is not None and angles[0].shape[0] > 1 else 0,
            *x.stride(),
        )

    def choose_prototypes(self) -> torch.Tensor:
        """Pack the codes of the prototypes that leave least over; return them, [B * Hkv, T] int32."""
        group, rows = self.layout.stages[0][0], self.batch * self.heads
        few = torch.empty(TRIED_PROTOTYPES, rows, self.tokens, dtype=torch.int32, device=self.x.device)
        errors = torch.zeros(few.shape, device=self.x.device)
        prototypes = self._codebooks[0][0].contiguous()
        wide = max(triton.next_power_of_2(self.dim), _LEAST_DOT)
        few_kernel[(self.num_pages, rows)](
            *self._vectors, prototypes, few, *self._sizes, K=group.num_centroids, BD=wide, BK=_BLOCK_CENTROIDS, **self._turn()
        )
        channel = 0
        for parts, table in zip(self.layout.stages[1], self._codebooks[1], strict=True):
            error_kernel[(self.num_pages, rows, TRIED_PROTOTYPES)](
                *(*self._vectors, prototypes, few, table.contiguous(), errors, *self._sizes, channel),
                **dict(M=parts.num_subspaces, K=group.num_centroids, **self._part(parts), **self._turn()),
            )
            channel += parts.num_channels
        chosen, least = few[0], errors[0]
        for tried, error in zip(few[1:], errors[1:], strict=True):
            better = error < least
            chosen, least = torch.where(better, tried, chosen), torch.where(better, error, least)
        codes, low = chosen.view(self.batch, self.heads, self.num_pages, PAGE_TOKENS).transpose(1, 2), 0
        for share in self._joint.shares[0][0]:
            packed = pack_known((codes >> low) & ((1 << share.nbits) - 1), share.nbits)
            self.pages[..., share.byte_offset : share.byte_offset + packed.shape[-1]] = packed
            low += share.nbits
        return chosen

    def encode(self, group: CodeGroup, stage: int, index: int, channel: int, chosen: torch.Tensor | None) -> None:
        """Pack the nearest centroids of one group, of what `chosen` prototypes or the stages before leave over."""
        table, shares = self._codebooks[stage][index].contiguous(), self._joint.shares[stage][index]
        prototypes = table if chosen is None else self._codebooks[0][0].contiguous()
        absent = _MOST_SHARES - len(shares)
        encode_kernel[(self.num_pages, self.batch * self.heads, group.num_subspaces)](
            *(*self._vectors, prototypes, self.x if chosen is None else chosen, table, self.residual, self.pages),
            *(*self._sizes, channel, self.tables.layout.page_bytes, *(share.byte_offset for share in shares), *[0] * absent),
            FIRST=stage == 0 or chosen is not None,
            LAST=stage == len(self.layout.stages) - 1,
            CHOSEN=0 if chosen is None else self.layout.stages[0][0].num_centroids,
            **{f"N{i}": nbits for i, nbits in enumerate([*(share.nbits for share in shares), *[0] * absent])},
            **self._part(group),
            **self._turn(),
        )

    def _part(self, group: CodeGroup) -> dict[str, Any]:
        sizes = {"DSUB": group.subspace_dim, "BD": triton.next_power_of_2(group.subspace_dim)}
        return {"NBITS": group.nbits, "BK": min(group.num_centroids, _BLOCK_CENTROIDS), **sizes}

    def _turn(self) -> dict[str, Any]:
        return {"TURN": self.tables.rotary is not None, "D": self.dim, "num_warps": 4}


def check_encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> None:
    """Check what `triton_encode` is given.

    Raises
    ------
    KernelError
        If shapes or devices do not fit, or angles are missing.
    """
    heads, dim = tables.num_heads, tables.layout.head_dim
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != (heads, dim) or x.shape[2] % PAGE_TOKENS:
        raise KernelError(f"vectors have shape {list(x.shape)}; expected [B, {heads}, a multiple of {PAGE_TOKENS}, {dim}]")
    if x.device != tables.codebooks[0][0].device:
        raise KernelError(f"vectors lie on {x.device}, tables on {tables.codebooks[0][0].device}; expected one device")
    check_angles(angles, tables, x.shape[0], x.shape[2])
