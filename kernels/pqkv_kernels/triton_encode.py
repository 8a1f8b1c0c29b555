"""The kernel that turns vectors into packed codes in one pass: un-rotate, map, nearest centroid, pack; and its launcher.

One program serves one subspace of one page: 64 tokens, all its centroids. Sums are fp32, addresses int64.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pqkv_kernels.angles import Angles
from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS
from pqkv_kernels.tables import CodecTables

_BLOCK_CENTROIDS = 32


@dataclass(frozen=True, slots=True)
class ChannelTables:
    """What makes every channel of the code space out of at most two of the vectors'.

    ``own`` and ``partner`` are their indices, ``sign`` the sign of the sine with which the partner is turned in, ``pair`` their
    rotary pair (the number of pairs: none), ``own_factor`` and ``partner_factor`` a row of the map; all [Hkv, D].
    """

    own: torch.Tensor
    partner: torch.Tensor
    pair: torch.Tensor
    sign: torch.Tensor
    own_factor: torch.Tensor
    partner_factor: torch.Tensor


def triton_encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None = None) -> torch.Tensor:
    """Encode as `pqkv_kernels.codec.encode` does; arguments are checked already."""
    if tables.map is not None and tables.map.ndim == 3:
        x = x.float() @ tables.map.mT
    channels = _channel_tables(tables)
    batch, heads, tokens, dim = x.shape
    num_pages = tokens // PAGE_TOKENS
    pages = torch.empty(batch, num_pages, heads, tables.layout.page_bytes, dtype=torch.uint8, device=x.device)
    if not pages.numel():
        return pages
    num_stages = len(tables.layout.stages)
    residual = torch.empty(batch, heads, tokens, dim, device=x.device) if num_stages > 1 else x
    cos, sin = (x, x) if angles is None else (t.contiguous() for t in angles)
    for stage, i, group, byte_offset, channel in tables.layout.spans():
        encode_kernel[(num_pages, batch * heads, group.num_subspaces)](
            x,
            *(channels.own, channels.partner, channels.pair, channels.sign, channels.own_factor, channels.partner_factor),
            *(cos, sin, tables.codebooks[stage][i].contiguous(), residual, pages),
            *(heads, num_pages, tables.layout.page_bytes, byte_offset, channel),
            0 if tables.rotary is None else tables.rotary.num_pairs,
            tokens if angles is not None and angles[0].shape[0] > 1 else 0,
            *x.stride(),
            TURN=tables.rotary is not None,
            FIRST=stage == 0,
            LAST=stage == num_stages - 1,
            **dict(NBITS=group.nbits, DSUB=group.subspace_dim, BD=triton.next_power_of_2(group.subspace_dim), D=dim),
            BK=min(group.num_centroids, _BLOCK_CENTROIDS),
            num_warps=4,
        )
    return pages


def _channel_tables(tables: CodecTables) -> ChannelTables:
    if "channels" not in tables.derived:
        tables.derived["channels"] = _make_channel_tables(tables)
    found: ChannelTables = tables.derived["channels"]
    return found


def _make_channel_tables(tables: CodecTables) -> ChannelTables:
    heads, dim, device = tables.num_heads, tables.layout.head_dim, tables.codebooks[0][0].device
    every = torch.arange(dim, device=device)
    own = every.expand(heads, dim) if tables.permutation is None else tables.permutation.long()
    partner, pair, sign, num_pairs = every.clone(), torch.zeros_like(every), torch.ones_like(every), 0
    factor = torch.ones(heads, dim, device=device)
    partner_factor = torch.zeros(heads, dim, device=device)
    if tables.rotary is not None:
        num_pairs = tables.rotary.num_pairs
        blocks = tables.rotary.blocks(dim) if (dim - tables.rotary.rotary_dim) % 2 == 0 else tables.rotary.pairs()
        first, second = torch.tensor(blocks, device=device).unbind(1)
        partner[first], partner[second], sign[second] = second, first, -1
        pair = torch.full_like(every, num_pairs)
        pair[first] = pair[second] = torch.arange(len(first), device=device).clamp(max=num_pairs)
        if tables.map is not None and tables.map.ndim == 4:
            rows = tables.map
            factor[:, first], partner_factor[:, first] = rows[..., 0, 0], rows[..., 0, 1]
            factor[:, second], partner_factor[:, second] = rows[..., 1, 1], rows[..., 1, 0]
    if tables.map is not None and tables.map.ndim == 2:
        factor = tables.map
    partner, pair = (t.expand(heads, dim).gather(1, own).to(torch.int32) for t in (partner, pair))
    signs = sign.expand(heads, dim).gather(1, own).float()
    factors = (t.gather(1, own).contiguous() for t in (factor, partner_factor))
    return ChannelTables(own.to(torch.int32).contiguous(), partner, pair, signs, *factors)


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
    if tables.rotary is None:
        return
    if angles is None:
        raise KernelError("keys coded before rotary embedding need the angles of their positions; none were given")
    expected = [x.shape[2], tables.rotary.num_pairs]
    if list(angles[0].shape[1:]) != expected or angles[0].shape[0] not in (1, x.shape[0]):
        raise KernelError(f"angles have shape {list(angles[0].shape)}; expected [{x.shape[0]}, {expected[0]}, {expected[1]}]")


@triton.jit
def encode_kernel(
    p_x,
    p_own,
    p_partner,
    p_pair,
    p_sign,
    p_own_factor,
    p_partner_factor,
    p_cos,
    p_sin,
    p_centroids,
    p_residual,
    p_pages,
    heads,
    num_pages,
    page_bytes,
    byte_offset,
    first_channel,
    num_pairs,
    angle_row,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    TURN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    NBITS: tl.constexpr,
    DSUB: tl.constexpr,
    BD: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Encode one subspace of one page of one head; p_x [B, Hkv, T, D], p_pages [B, P, Hkv, page_bytes]."""
    i_page = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    i_m = tl.program_id(2).to(tl.int64)
    i_b = i_head // heads
    i_h = i_head % heads
    o_t = tl.arange(0, 64)
    t = i_page * 64 + o_t[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < DSUB
    o_c = first_channel + i_m * DSUB + o_d
    p_rest = p_residual + (i_head * num_pages * 64 + t) * D + o_c
    if FIRST:
        p_row = p_x + i_b * stride_b + i_h * stride_h + t * stride_t
        own = tl.load(p_own + i_h * D + o_c, mask=m_d, other=0)
        # [64, BD]
        point = tl.load(p_row + own * stride_d, mask=m_d, other=0.0).to(tl.float32)
        factor = tl.load(p_own_factor + i_h * D + o_c, mask=m_d, other=0.0)
        if TURN:
            partner = tl.load(p_partner + i_h * D + o_c, mask=m_d, other=0)
            other = tl.load(p_row + partner * stride_d, mask=m_d, other=0.0).to(tl.float32)
            pair = tl.load(p_pair + i_h * D + o_c, mask=m_d, other=0)
            m_turn = m_d & (pair < num_pairs)
            p_angle = (i_b * angle_row + t) * num_pairs + pair
            cos = tl.load(p_cos + p_angle, mask=m_turn, other=1.0)
            sin = tl.load(p_sin + p_angle, mask=m_turn, other=0.0) * tl.load(p_sign + i_h * D + o_c, mask=m_d, other=0.0)
            point, other = point * cos + other * sin, other * cos - point * sin
            point = point * factor + other * tl.load(p_partner_factor + i_h * D + o_c, mask=m_d, other=0.0)
        else:
            point = point * factor
    else:
        point = tl.load(p_rest, mask=m_d, other=0.0)
    centroids = p_centroids + (i_h * tl.num_programs(2) + i_m) * ((1 << NBITS) * DSUB)
    best = tl.full((64,), float("inf"), tl.float32)
    code = tl.zeros((64,), tl.int32)
    for start in range(0, 1 << NBITS, BK):
        rows = start + tl.arange(0, BK)[:, None]
        lines = tl.load(centroids + rows * DSUB + o_d, mask=m_d, other=0.0).to(tl.float32)
        gap = point[:, None, :] - lines[None, :, :]
        distance = tl.sum(gap * gap, 2)
        nearest = tl.min(distance, 1)
        code = tl.where(nearest < best, start + tl.argmin(distance, 1), code)
        best = tl.minimum(best, nearest)
    if not LAST:
        tl.store(p_rest, point - tl.load(centroids + code[:, None] * DSUB + o_d, mask=m_d, other=0.0).to(tl.float32), mask=m_d)
    page = p_pages + ((i_b * num_pages + i_page) * heads + i_h) * page_bytes + byte_offset + i_m * (8 * NBITS)
    if NBITS >= 8:
        tl.store(page + o_t, (code & 255).to(tl.uint8))
    low: tl.constexpr = 8 if NBITS >= 8 else 0
    if (NBITS & 4) != 0:
        four = ((code >> low) & 15) << (4 * (o_t % 2))
        tl.store(page + 8 * low + tl.arange(0, 32), tl.sum(tl.reshape(four, (32, 2)), 1).to(tl.uint8))
    if (NBITS & 2) != 0:
        two = ((code >> (low + (NBITS & 4))) & 3) << (2 * (o_t % 4))
        tl.store(page + 8 * (low + (NBITS & 4)) + tl.arange(0, 16), tl.sum(tl.reshape(two, (16, 4)), 1).to(tl.uint8))
    if (NBITS & 1) != 0:
        one = ((code >> (NBITS - 1)) & 1) << (o_t % 8)
        tl.store(page + 8 * (NBITS - 1) + tl.arange(0, 8), tl.sum(tl.reshape(one, (8, 8)), 1).to(tl.uint8))
