"""The kernel that brings vectors to code space: un-rotate, map, and lay channels apart. `triton_encode` launches it."""

import triton
import triton.language as tl


@triton.jit
def points_kernel(
    p_x,
    p_places,
    p_factors,
    p_cos,
    p_sin,
    p_points,
    heads,
    num_tokens,
    num_pairs,
    angle_row,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    TURN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Store 64 tokens of `BD` code-space channels of one head; p_points [B * Hkv, D, T] fp32.

    `p_x` [B, Hkv, T, D] has any strides; a code-space channel is made of at most two of its channels
    (`pqkv_kernels.channel_tables`), turned back by p_cos and p_sin [B, T, pairs], whose rows are `angle_row` tokens apart.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_b = i_head // heads
    table = i_head % heads * (3 * D)
    t = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    o_d = tl.program_id(2) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    p_row = p_x + i_b * stride_b + i_head % heads * stride_h + t * stride_t
    own = tl.load(p_places + table + o_d, mask=m_d, other=0)
    # Lanes go along channels, says the hint (see `triton_planes`): they lie together in memory, or nearly so.
    p_own = tl.multiple_of(tl.max_contiguous(p_row + own * stride_d, [1, BD]), [1, 1])
    point = tl.load(p_own, mask=m_d, other=0.0).to(tl.float32)
    factor = tl.load(p_factors + table + D + o_d, mask=m_d, other=0.0)
    if TURN:
        partner = tl.load(p_places + table + D + o_d, mask=m_d, other=0)
        p_partner = tl.multiple_of(tl.max_contiguous(p_row + partner * stride_d, [1, BD]), [1, 1])
        other = tl.load(p_partner, mask=m_d, other=0.0).to(tl.float32)
        pair = tl.load(p_places + table + 2 * D + o_d, mask=m_d, other=0)
        m_turn = m_d & (pair < num_pairs)
        at = (i_b * angle_row + t) * num_pairs + pair
        p_cos = tl.multiple_of(tl.max_contiguous(p_cos + at, [1, BD]), [1, 1])
        p_sin = tl.multiple_of(tl.max_contiguous(p_sin + at, [1, BD]), [1, 1])
        cos = tl.load(p_cos, mask=m_turn, other=1.0)
        sin = tl.load(p_sin, mask=m_turn, other=0.0) * tl.load(p_factors + table + o_d, mask=m_d, other=0.0)
        point, other = point * cos + other * sin, other * cos - point * sin
        point = point * factor + other * tl.load(p_factors + table + 2 * D + o_d, mask=m_d, other=0.0)
    else:
        point = point * factor
    tl.store(p_points + (i_head * D + o_d) * num_tokens + t, point, mask=m_d)
