"""Turns vectors into packed codes on a GPU: checks, layouts and launches the kernels. Sums are fp32, addresses int64."""

from typing import Any

import torch
import triton

from pqkv_kernels.format.layout import PAGE_TOKENS, TRIED_PROTOTYPES, CodeGroup
from pqkv_kernels.format.packing import pack_known
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables, channel_tables
from pqkv_kernels.gpu.encode_kernels import (
    LEAST_LINES,
    TOKENS,
    encode_kernel,
    error_kernel,
    few_kernel,
    lines_kernel,
    points_kernel,
)
from pqkv_kernels.gpu.version import dot_width, launch_options
from pqkv_kernels.reference.merged_stages import joint_layout

_SCRATCH_NUMBERS = 1 << 23  # points held at a time, 32 MiB: they are read again while they lie in the second-level cache
_MOST_TILES = 32  # a program's tokens, in `TOKENS`: then its table has paid for its way
_MOST_SHARES = 4  # stages that the kernel packs one joint code to
FEW_STAGES = 3  # rounds of `few_kernel` under way at a time: its prototypes come from afar
_LEAST_DOT = 16  # no side of a matrix product on tensor cores is shorter


def triton_encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode as `pqkv_kernels.reference.encode.encode` does; arguments are checked already."""
    if tables.map is not None and tables.map.ndim == 3:
        x = x.float() @ tables.map.mT
    batch, heads, tokens, dim = x.shape
    page_bytes = tables.layout.page_bytes
    pages = torch.empty(batch, tokens // PAGE_TOKENS, heads, page_bytes, dtype=torch.uint8, device=x.device)
    if pages.numel():
        encoder = _Encoder(tables)
        step = max(1, _SCRATCH_NUMBERS // (batch * heads * dim * PAGE_TOKENS))
        for first in range(0, pages.shape[1], step):
            part = slice(first * PAGE_TOKENS, (first + step) * PAGE_TOKENS)
            encoder.encode(x[:, :, part], None if angles is None else _rows(angles, part), pages[:, first : first + step])
    return pages


def _rows(angles: Angles, part: slice) -> Angles:
    cos, sin = (t.contiguous()[:, part] for t in angles)
    return cos, sin


class _Encoder:
    """One codec, its centroids made operands for as long as this lives: they are larger than codebooks."""

    def __init__(self, tables: CodecTables) -> None:
        self.tables = tables
        self._joint = joint_layout(tables.layout)
        self.layout, codebooks = self._joint.layout, self._joint.codebooks(tables.codebooks)
        self._codebooks = [[table.contiguous() for table in stage] for stage in codebooks]
        self._lines = {
            (stage, i): _lines(group, self._codebooks[stage][i])
            for stage, i, group, _, _ in self.layout.spans()
            if stage or not self.layout.has_prototypes
        }

    def encode(self, x: torch.Tensor, angles: Angles | None, pages: torch.Tensor) -> None:
        """Fill `pages` [B, P, Hkv, page_bytes], of which rows may be apart, with the codes of `x` [B, Hkv, 64 P, D]."""
        points = self._points(x, angles)
        chosen = self._chosen(points, pages) if self.layout.has_prototypes else None
        for stage, i, group, _, channel in self.layout.spans():
            if stage or chosen is None:
                self._encode_group(points, pages, (stage, i), group, channel, chosen)

    def _points(self, x: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Return the code-space vectors [B * Hkv, D, T] fp32, channel by channel."""
        batch, heads, tokens, dim = x.shape
        points = torch.empty(batch * heads, dim, tokens, device=x.device)
        channels = channel_tables(self.tables)
        cos, sin = (points, points) if angles is None else angles  # those without angles are never read
        pairs = 0 if self.tables.rotary is None else self.tables.rotary.num_pairs
        angle_row = cos.stride(0) // pairs if pairs and cos.shape[0] > 1 else 0
        block = min(32, triton.next_power_of_2(dim))
        points_kernel[(tokens // PAGE_TOKENS, batch * heads, triton.cdiv(dim, block))](
            p_x=x,
            p_places=channels.places,
            p_factors=channels.factors,
            p_cos=cos,
            p_sin=sin,
            p_points=points,
            heads=heads,
            num_tokens=tokens,
            num_pairs=pairs,
            angle_row=angle_row,
            **dict(zip(("stride_b", "stride_h", "stride_t", "stride_d"), x.stride(), strict=True)),
            ROTATED=self.tables.rotary is not None,
            D=dim,
            BD=block,
            **launch_options(4),
        )
        return points

    def _chosen(self, points: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Pack the codes of the prototypes that leave least over; return them, [B * Hkv, T] int32."""
        group, prototypes, heads = self.layout.stages[0][0], self._codebooks[0][0], self.tables.num_heads
        rows, dim, tokens = points.shape
        few = torch.empty(TRIED_PROTOTYPES, rows, tokens, dtype=torch.int32, device=points.device)
        shrink = torch.exp2(-prototypes.float().abs().amax((1, 2, 3)).clamp(1e-30, 1e30).log2().ceil())
        squares = shrink[:, None] * prototypes.float().square().sum(-1)[:, 0]
        few_kernel[(tokens // PAGE_TOKENS, rows)](
            p_points=points,
            p_prototypes=prototypes,
            p_squares=squares,
            p_shrink=shrink,
            p_few=few,
            heads=heads,
            num_tokens=tokens,
            WIDE=prototypes.dtype == torch.float32,
            K=group.num_centroids,
            D=dim,
            BD=max(triton.next_power_of_2(dim), _LEAST_DOT),
            **launch_options(4, num_stages=FEW_STAGES),
        )
        errors = self._errors(points, prototypes, few)
        chosen = few.gather(0, errors.argmin(0, keepdim=True))[0]
        batch = rows // heads
        codes, low = chosen.view(batch, heads, -1, PAGE_TOKENS).transpose(1, 2), 0
        for share in self._joint.shares[0][0]:
            packed = pack_known((codes >> low) & ((1 << share.nbits) - 1), share.nbits)
            pages[..., share.byte_offset : share.byte_offset + packed.shape[-1]] = packed
            low += share.nbits
        return chosen

    def _errors(self, points: torch.Tensor, prototypes: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
        """Return what the parts leave over of points less the prototypes `few`, [tried, B * Hkv, T] fp32."""
        total, channel = torch.zeros(few.shape, device=points.device), 0
        for i, group in enumerate(self.layout.stages[1]):
            errors = torch.empty(group.num_subspaces, *few.shape, device=points.device)
            tiles, grid = self._grid(points, group)
            error_kernel[grid](
                p_points=points,
                p_prototypes=prototypes,
                p_few=few,
                p_errors=errors,
                tried=len(few),
                CHOSEN=prototypes.shape[2],
                **self._part((1, i), group, tiles, channel, points),
                **launch_options(1),
            )
            total += errors.sum(0)
            channel += group.num_channels
        return total

    def _encode_group(
        self,
        points: torch.Tensor,
        pages: torch.Tensor,
        place: tuple[int, int],
        group: CodeGroup,
        channel: int,
        chosen: torch.Tensor | None,
    ) -> None:
        """Pack the nearest centroids of one group, of what `chosen` prototypes or the stages before leave over."""
        stage, index = place
        shares = self._joint.shares[stage][index]
        absent = [0] * (_MOST_SHARES - len(shares))
        offsets, widths = ([getattr(share, name) for share in shares] + absent for name in ("byte_offset", "nbits"))
        prototypes = points if chosen is None else self._codebooks[0][0]
        tiles, grid = self._grid(points, group)
        encode_kernel[grid](
            p_points=points,
            p_prototypes=prototypes,
            p_chosen=points if chosen is None else chosen,
            p_pages=pages,
            row_bytes=pages.stride(0),
            page_bytes=pages.shape[3],
            **{f"offset_{i}": offset for i, offset in enumerate(offsets)},
            **{f"N{i}": nbits for i, nbits in enumerate(widths)},
            LAST=stage == len(self.layout.stages) - 1,
            CHOSEN=0 if chosen is None else self.layout.stages[0][0].num_centroids,
            **self._part(place, group, tiles, channel, points),
            **launch_options(1),
        )

    def _grid(self, points: torch.Tensor, group: CodeGroup) -> tuple[int, tuple[int, int, int]]:
        tiles = points.shape[2] // TOKENS.value
        share = min(tiles, _MOST_TILES)
        return share, (triton.cdiv(tiles, share), group.num_subspaces, len(points))

    def _part(self, place: tuple[int, int], group: CodeGroup, tiles: int, channel: int, points: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a kernel that reads the centroids of the group at `place`."""
        stage, index = place
        size, dim = group.num_centroids, self.tables.layout.head_dim
        lines = max(size, LEAST_LINES.value)
        numbers = {"heads": self.tables.num_heads, "num_tokens": points.shape[2], "tiles": tiles, "first_channel": channel}
        shape = {"K": size, "LINES": lines, "CHUNK": min(lines, 64), "DSUB": group.subspace_dim, "D": dim, "WIDTH": dot_width()}
        return {"p_centroids": self._codebooks[stage][index], **self._lines[place], **numbers, **shape}


def _lines(group: CodeGroup, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `lines_kernel` makes of `table` [Hkv, M, K, d]: lines, and how points are scaled and moved."""
    count, size, dim = table.shape[0] * group.num_subspaces, group.num_centroids, group.subspace_dim
    lines = torch.empty(count, triton.cdiv(dim, 4), max(size, LEAST_LINES.value), 16, dtype=torch.float16, device=table.device)
    shrink, shift = torch.empty(count, device=table.device), torch.empty(count, dim, device=table.device)
    made = {"p_lines": lines, "p_shrink": shrink, "p_shift": shift}
    lines_kernel[(count,)](
        p_centroids=table, **made, K=size, DSUB=dim, BD=triton.next_power_of_2(dim), BK=64, **launch_options(4)
    )
    return made
