"""The kernel that finds and packs codes: un-rotate, map, nearest centroid, pack. `triton_encode` launches it.

Vectors come as `p_x` [B, Hkv, T, D] of any strides; a code-space channel is made of at most two of theirs
(`pqkv_kernels.channel_tables`). One program serves 64 tokens, a page, of one head.
"""

import triton
import triton.language as tl


@triton.jit
def load_points(
    p_row,
    p_places,
    p_factors,
    p_cos,
    p_sin,
    turn_row,
    o_c,
    m_d,
    stride_d,
    num_pairs,
    TURN: tl.constexpr,
    D: tl.constexpr,
):
    """Return the code-space channels `o_c` [1, BD] of 64 tokens, [64, BD]; `p_row` and `turn_row` are [64, 1]."""
    own = tl.load(p_places + o_c, mask=m_d, other=0)
    point = tl.load(p_row + own * stride_d, mask=m_d, other=0.0).to(tl.float32)
    factor = tl.load(p_factors + D + o_c, mask=m_d, other=0.0)
    if TURN:
        partner = tl.load(p_places + D + o_c, mask=m_d, other=0)
        other = tl.load(p_row + partner * stride_d, mask=m_d, other=0.0).to(tl.float32)
        pair = tl.load(p_places + 2 * D + o_c, mask=m_d, other=0)
        m_turn = m_d & (pair < num_pairs)
        p_angle = turn_row * num_pairs + pair
        cos = tl.load(p_cos + p_angle, mask=m_turn, other=1.0)
        sin = tl.load(p_sin + p_angle, mask=m_turn, other=0.0) * tl.load(p_factors + o_c, mask=m_d, other=0.0)
        point, other = point * cos + other * sin, other * cos - point * sin
        point = point * factor + other * tl.load(p_factors + 2 * D + o_c, mask=m_d, other=0.0)
    else:
        point = point * factor
    return point


@triton.jit
def nearest_code(point, p_lines, o_d, m_d, NBITS: tl.constexpr, DSUB: tl.constexpr, BK: tl.constexpr):
    """Return the nearest of the centroids `p_lines` [2 ** NBITS, DSUB] to `point` [64, BD] and its squared distance, [64]."""
    best = tl.full((64,), float("inf"), tl.float32)
    code = tl.zeros((64,), tl.int32)
    for start in range(0, 1 << NBITS, BK):
        rows = start + tl.arange(0, BK)[:, None]
        lines = tl.load(p_lines + rows * DSUB + o_d, mask=m_d, other=0.0).to(tl.float32)
        gap = point[:, None, :] - lines[None, :, :]
        distance = tl.sum(gap * gap, 2)
        nearest = tl.min(distance, 1)
        code = tl.where(nearest < best, start + tl.argmin(distance, 1), code)
        best = tl.minimum(best, nearest)
    return code, best


@triton.jit
def pack_code(page, code, o_t, NBITS: tl.constexpr):
    """Store the lowest `NBITS` bits of 64 codes `code` [64] at `page`, in the parts of `layout.code_parts`."""
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


@triton.jit
def encode_kernel(
    p_x,
    p_places,
    p_factors,
    p_cos,
    p_sin,
    p_prototypes,
    p_chosen,
    p_centroids,
    p_residual,
    p_pages,
    heads,
    num_pages,
    num_pairs,
    angle_row,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    first_channel,
    page_bytes,
    offset_0,
    offset_1,
    offset_2,
    offset_3,
    TURN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHOSEN: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    NBITS: tl.constexpr,
    DSUB: tl.constexpr,
    BD: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Encode one subspace of one page of one head; p_pages [B, P, Hkv, page_bytes].

    Of vectors (FIRST), less one of CHOSEN prototypes where there are any: p_chosen [B * Hkv, T]; or of what the stages before
    left over, p_residual [B, Hkv, T, D], which is brought up to date unless this is the LAST stage. The code of NBITS is that
    of up to four stages taken together, of N0 bits (the lowest) to N3; 0: there is none.
    """
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
    table = i_h * 3 * D
    if FIRST:
        p_row = p_x + i_b * stride_b + i_h * stride_h + t * stride_t
        turn = i_b * angle_row + t
        point = load_points(
            p_row, p_places + table, p_factors + table, p_cos, p_sin, turn, o_c, m_d, stride_d, num_pairs, TURN, D
        )
        if CHOSEN:
            chosen = tl.load(p_chosen + i_head * num_pages * 64 + t)
            point -= tl.load(p_prototypes + (i_h * CHOSEN + chosen) * D + o_c, mask=m_d, other=0.0).to(tl.float32)
    else:
        point = tl.load(p_rest, mask=m_d, other=0.0)
    centroids = p_centroids + (i_h * tl.num_programs(2) + i_m) * ((1 << NBITS) * DSUB)
    code, _ = nearest_code(point, centroids, o_d, m_d, NBITS, DSUB, BK)
    if not LAST:
        tl.store(p_rest, point - tl.load(centroids + code[:, None] * DSUB + o_d, mask=m_d, other=0.0).to(tl.float32), mask=m_d)
    page = p_pages + ((i_b * num_pages + i_page) * heads + i_h) * page_bytes
    pack_code(page + offset_0 + i_m * (8 * N0), code, o_t, N0)
    if N1:
        pack_code(page + offset_1 + i_m * (8 * N1), code >> N0, o_t, N1)
    if N2:
        pack_code(page + offset_2 + i_m * (8 * N2), code >> (N0 + N1), o_t, N2)
    if N3:
        pack_code(page + offset_3 + i_m * (8 * N3), code >> (N0 + N1 + N2), o_t, N3)
