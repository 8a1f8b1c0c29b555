"""Encode and decode: what codes mean, in plain fp32 torch. Defines the meaning of every faster implementation."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.checks import check_angles
from pqkv_kernels.format.layout import PAGE_TOKENS, TRIED_PROTOTYPES, CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.packing import pack_known, unpack_codes
from pqkv_kernels.format.rotary import Angles, rotate, unrotate
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.merged_stages import joint_layout
from pqkv_kernels.reference.nearest import nearest_centroids, nearest_few

Parts = tuple[torch.Tensor, ...]
Codebooks = tuple[Parts, ...]


def dequantize(codes: list[torch.Tensor], layout: CodeLayout, codebooks: Codebooks) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, T, D] fp32 of `codes` as `Encoder.quantize` returns them."""
    total: torch.Tensor | None = None
    start = 0
    for i, stage in enumerate(layout.stages):
        part = _lookup_stage(codes[start : start + len(stage)], codebooks[i])
        total = part if total is None else total + part
        start += len(stage)
    assert total is not None  # a layout has at least one stage
    return total


def _lookup_stage(codes: list[torch.Tensor], tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    parts = []
    for group_codes, table in zip(codes, tables, strict=True):
        num_heads, num_subspaces, num_centroids, _ = table.shape
        first_row = torch.arange(num_heads * num_subspaces, device=table.device) * num_centroids
        rows = group_codes.long() + first_row.view(num_heads, num_subspaces, 1)
        vectors = F.embedding(rows, table.float().flatten(0, 2))  # [B, Hkv, M, T, dsub]
        parts.append(vectors.transpose(2, 3).flatten(3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def decode(pages: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Return the model-space vectors [B, Hkv, 64 * P, D] fp32 that `pages` [B, P, Hkv, page_bytes] stand for."""
    return from_code_space(decode_codes(pages, tables), tables, angles)


def page_codes(pages: torch.Tensor, layout: CodeLayout) -> list[torch.Tensor]:
    """Return the codes [B, Hkv, M, 64 * P] int32 of every group in storage order of `pages` [B, P, Hkv, page_bytes]."""
    codes = []
    for _, _, group, byte_offset, _ in layout.spans():
        span = pages[..., byte_offset : byte_offset + group.page_bytes].unflatten(
            -1, (group.num_subspaces, group.page_bytes // group.num_subspaces)
        )
        codes.append(unpack_codes(span, group.nbits).permute(0, 2, 3, 1, 4).flatten(3))
    return codes


def decode_codes(pages: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    """Return the code-space vectors [B, Hkv, 64 * P, D] fp32 of `pages` [B, P, Hkv, page_bytes] uint8.

    Raises
    ------
    KernelError
        If the pages are not of this layout.
    """
    found = (pages.ndim, *pages.shape[2:])
    if found != (4, tables.num_heads, tables.layout.page_bytes):
        raise KernelError(
            f"pages have shape {list(pages.shape)}; expected [B, P, {tables.num_heads}, {tables.layout.page_bytes}]"
        )
    return dequantize(page_codes(pages, tables.layout), tables.layout, tables.codebooks)


def from_code_space(
    x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True
) -> torch.Tensor:
    """Undo `Encoder.to_code_space`."""
    if tables.permutation is not None:
        x = _take_channels(x, tables.inverse_permutation())
    if tables.map is not None:
        x = x / tables.map[:, None] if tables.inverse is None else _mapped(x, tables.inverse, tables.rotary)
    needed = _needed_angles(tables, angles, x) if rotated else None
    if needed is not None and tables.rotary is not None:
        x = rotate(x, needed[0][:, None], needed[1][:, None], tables.rotary)
    return x


def _mapped(x: torch.Tensor, matrices: torch.Tensor, rotary: RotaryLayout | None) -> torch.Tensor:
    """Apply matrices [Hkv, D, D], or blocks [Hkv, D / 2, 2, 2] over the channel pairs of `rotary`."""
    if matrices.ndim == 3:
        return x @ matrices.mT
    assert rotary is not None  # CodecTables accepts blocks only together with it
    first, second = _block_channels(rotary, x.shape[-1], x.device)
    a, b = x[..., first], x[..., second]
    rows = matrices[:, None]  # [Hkv, 1, D / 2, 2, 2]
    mapped = torch.empty_like(x)
    mapped[..., first] = rows[..., 0, 0] * a + rows[..., 0, 1] * b
    mapped[..., second] = rows[..., 1, 0] * a + rows[..., 1, 1] * b
    return mapped


@lru_cache
def _block_channels(rotary: RotaryLayout, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second channel of every block; kept, because making them lets a GPU wait for the host."""
    first, second = torch.tensor(rotary.blocks(dim)).unbind(1)
    return first.to(device), second.to(device)


def _take_channels(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, index.long()[None, :, None].expand(x.shape))


def _needed_angles(tables: CodecTables, angles: Angles | None, x: torch.Tensor) -> Angles | None:
    """Return the angles by which `x` [B, Hkv, T, D] are rotated, None where the codec does not ask."""
    check_angles(angles, tables, x.shape[0], x.shape[2])
    return angles if tables.rotary is not None else None


class Encoder:
    """The steps by which vectors become codes, in plain torch. A backend replaces steps by faster ones of the same meaning."""

    def nearest(self, points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        """Return what `nearest_centroids` does."""
        return nearest_centroids(points, centroids)

    def few(self, points: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
        """Return what `nearest_few` does."""
        return nearest_few(points, centroids, count)

    def code_space(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
        """Return code-space vectors [B, Hkv, T, D] fp32 of checked `x`; without `angles` they are not rotated back."""
        x = x.float()
        if angles is not None and tables.rotary is not None:
            x = unrotate(x, angles[0][:, None], angles[1][:, None], tables.rotary)
        if tables.map is not None:
            x = x * tables.map[:, None] if tables.map.ndim == 2 else _mapped(x, tables.map, tables.rotary)
        return x if tables.permutation is None else _take_channels(x, tables.permutation)

    def best(
        self, x: torch.Tensor, few: torch.Tensor, table: torch.Tensor, stage: tuple[CodeGroup, ...], parts: Parts
    ) -> list[torch.Tensor]:
        """Return the codes of the best of a few prototypes and of its parts.

        Parameters
        ----------
        x
            Code-space vectors [B, Hkv, T, D] fp32.
        few
            Numbers of the prototypes to try, [B, Hkv, n, T] int64, the nearest first.
        table
            Prototypes, [Hkv, C, D] fp32.
        stage, parts
            The groups of the second stage and their codebooks [Hkv, M, ksub, dsub].
        """
        heads = torch.arange(len(table), device=x.device)[:, None]
        best: list[torch.Tensor] = []
        for tried in few.unbind(2):
            residual = x - table[heads, tried]
            codes = self._stage(residual, stage, parts)
            candidate = [tried[:, :, None], *codes]
            error = (residual - _lookup_stage(codes, parts)).square().sum(-1)[:, :, None]
            if not best:
                best, least = candidate, error
                continue
            better = error < least
            best = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]
            least = torch.where(better, error, least)
        return best

    def to_code_space(
        self, x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True
    ) -> torch.Tensor:
        """Return code-space vectors [B, Hkv, T, D] fp32 of model-space `x` [B, Hkv, T, D].

        Without `rotated`, `x` are keys before rotary embedding and need no angles.

        Raises
        ------
        KernelError
            If `x` is not of the tables' heads and channels, or angles are needed and missing.
        """
        heads, dim = tables.num_heads, tables.layout.head_dim
        if x.ndim != 4 or (x.shape[1], x.shape[3]) != (heads, dim):
            raise KernelError(f"vectors have shape {list(x.shape)}; expected [B, {heads}, T, {dim}]")
        return self.code_space(x, tables, _needed_angles(tables, angles, x) if rotated else None)

    def quantize(self, x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
        """Return the codes [B, Hkv, M, T] int64 of every group in storage order for code-space `x` [B, Hkv, T, D].

        Where the joint layout has prototypes, the `TRIED_PROTOTYPES` nearest are tried and the vector of least squared error is
        stored; of equal ones that of the nearer prototype.
        """
        joint = joint_layout(layout)
        x, tables = x.float(), joint.codebooks(codebooks)
        if joint.layout.has_prototypes and x.numel():
            codes = self._with_prototypes(x, joint.layout, tables)
        else:
            codes = self._stages(x, joint.layout.stages, tables)
        return joint.split(codes, layout)

    def encode(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
        """Encode whole pages of vectors.

        Parameters
        ----------
        x
            Keys (after rotary embedding, as a cache receives them) or values, [B, Hkv, T, D], T a multiple of 64.
        tables
            The codec.
        angles
            ``(cos, sin)`` of every token, each [B, T, rotary_dim / 2] fp32; needed where ``tables.rotary`` is set.

        Returns
        -------
        torch.Tensor
            Pages, [B, T / 64, Hkv, page_bytes] uint8.

        Raises
        ------
        KernelError
            If shapes do not fit or angles are missing.
        """
        if x.shape[2] % PAGE_TOKENS:
            raise KernelError(f"{x.shape[2]} tokens to encode; expected a multiple of {PAGE_TOKENS}")
        codes = self.quantize(self.to_code_space(x, tables, angles), tables.layout, tables.codebooks)
        packed = []
        for (_, _, group, _, _), group_codes in zip(tables.layout.spans(), codes, strict=True):
            by_page = group_codes.unflatten(-1, (x.shape[2] // PAGE_TOKENS, PAGE_TOKENS))
            pages = pack_known(by_page, group.nbits)  # [B, Hkv, M, P, bytes]
            packed.append(pages.permute(0, 3, 1, 2, 4).flatten(3))
        return torch.cat(packed, dim=-1)

    def round_trip(
        self, x: torch.Tensor, tables: CodecTables, angles: Angles | None = None, *, rotated: bool = True
    ) -> torch.Tensor:
        """Return what `x` [B, Hkv, T, D] (any T) becomes when encoded and decoded, fp32.

        Without `rotated`, `x` are keys before rotary embedding, and so is what is returned.
        """
        coded = self.to_code_space(x, tables, angles, rotated=rotated)
        codes = self.quantize(coded, tables.layout, tables.codebooks)
        return from_code_space(dequantize(codes, tables.layout, tables.codebooks), tables, angles, rotated=rotated)

    def _with_prototypes(self, x: torch.Tensor, layout: CodeLayout, codebooks: Codebooks) -> list[torch.Tensor]:
        table = codebooks[0][0][:, 0].float()  # [Hkv, C, D]
        points = x.transpose(0, 1).flatten(1, 2)  # [Hkv, B * T, D]
        few = self.few(points, table, min(TRIED_PROTOTYPES, table.shape[1]))  # [Hkv, n, B * T]
        few = few.view(*few.shape[:2], x.shape[0], x.shape[2]).permute(2, 0, 1, 3)
        return self.best(x, few, table, layout.stages[1], codebooks[1])

    def _stages(self, x: torch.Tensor, stages: tuple[tuple[CodeGroup, ...], ...], codebooks: Codebooks) -> list[torch.Tensor]:
        """Return the nearest codes stage by stage: each codes what the stages before leave over."""
        codes: list[torch.Tensor] = []
        for i, stage in enumerate(stages):
            stage_codes = self._stage(x, stage, codebooks[i])
            codes += stage_codes
            if i + 1 < len(stages):
                x = x - _lookup_stage(stage_codes, codebooks[i])
        return codes

    def _stage(self, x: torch.Tensor, stage: tuple[CodeGroup, ...], tables: Parts) -> list[torch.Tensor]:
        """Return the codes [B, Hkv, M, T] of one stage's groups for `x` [B, Hkv, T, D]."""
        batch, num_heads, num_tokens, _ = x.shape
        offset, codes = 0, []
        for group, table in zip(stage, tables, strict=True):
            part = x[..., offset : offset + group.num_channels].unflatten(-1, (group.num_subspaces, group.subspace_dim))
            points = part.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)  # [Hkv * M, B * T, dsub]
            nearest = self.nearest(points, table.float().flatten(0, 1))
            shape = (num_heads, group.num_subspaces, batch, num_tokens)
            codes.append(nearest.view(shape).permute(2, 0, 1, 3))
            offset += group.num_channels
        return codes


REFERENCE = Encoder()
encode, quantize, round_trip, to_code_space = (
    REFERENCE.encode,
    REFERENCE.quantize,
    REFERENCE.round_trip,
    REFERENCE.to_code_space,
)
