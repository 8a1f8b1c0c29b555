"""The kernels that find the nearest prototypes of vectors, and what parts leave over of each. `triton_encode` launches them.

Vectors come, and programs serve a page of one head, as in `pqkv_kernels.triton_codes`.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_codes import load_points, nearest_code


@triton.jit
def exchange(score, code, best, index):
    """Put (score, code) in the place of (best, index) where it is larger; return that place and what is left over."""
    better = score > best
    return (
        tl.where(better, score, best),
        tl.where(better, code, index),
        tl.where(better, best, score),
        tl.where(better, index, code),
    )


@triton.jit
def few_kernel(
    p_x,
    p_places,
    p_factors,
    p_cos,
    p_sin,
    p_prototypes,
    p_few,
    heads,
    num_pages,
    num_pairs,
    angle_row,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    TURN: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Find the four prototypes nearest to every vector of a page, nearest first; p_few [4, B * Hkv, T]."""
    i_page = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    i_b = i_head // heads
    i_h = i_head % heads
    o_t = tl.arange(0, 64)
    t = i_page * 64 + o_t[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    p_row = p_x + i_b * stride_b + i_h * stride_h + t * stride_t
    table = i_h * 3 * D
    turn = i_b * angle_row + t
    # [64, BD]
    point = load_points(p_row, p_places + table, p_factors + table, p_cos, p_sin, turn, o_d, m_d, stride_d, num_pairs, TURN, D)
    b0 = tl.full((64,), float("-inf"), tl.float32)
    b1, b2, b3 = b0, b0, b0
    c0 = tl.zeros((64,), tl.int32)
    c1, c2, c3 = c0, c0, c0
    o_k = tl.arange(0, BK)
    for start in range(0, K, BK):
        rows = start + o_k[:, None]
        p_line = p_prototypes + (i_h * K + rows) * D + o_d
        lines = tl.load(p_line, mask=m_d & (rows < K), other=0.0).to(tl.float32)
        # |x - c|^2 without |x|^2, and its sign turned: [64, BK]
        score = 2 * tl.dot(point, tl.trans(lines), input_precision="tf32x3") - tl.sum(lines * lines, 1)[None, :]
        score = tl.where(start + o_k[None, :] < K, score, float("-inf"))
        for _ in tl.static_range(4):
            place = tl.argmax(score, 1)
            s, c = tl.max(score, 1), start + place
            score = tl.where(o_k[None, :] == place[:, None], float("-inf"), score)
            b0, c0, s, c = exchange(s, c, b0, c0)
            b1, c1, s, c = exchange(s, c, b1, c1)
            b2, c2, s, c = exchange(s, c, b2, c2)
            b3, c3, s, c = exchange(s, c, b3, c3)
    row = p_few + i_head * num_pages * 64 + i_page * 64 + o_t
    step = tl.num_programs(1).to(tl.int64) * num_pages * 64
    # Where there are fewer prototypes, the first one is tried again: that changes nothing.
    tl.store(row, c0)
    tl.store(row + step, tl.where(b1 > float("-inf"), c1, c0))
    tl.store(row + 2 * step, tl.where(b2 > float("-inf"), c2, c0))
    tl.store(row + 3 * step, tl.where(b3 > float("-inf"), c3, c0))


@triton.jit
def error_kernel(
    p_x,
    p_places,
    p_factors,
    p_cos,
    p_sin,
    p_prototypes,
    p_few,
    p_centroids,
    p_errors,
    heads,
    num_pages,
    num_pairs,
    angle_row,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    first_channel,
    TURN: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    NBITS: tl.constexpr,
    DSUB: tl.constexpr,
    BD: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Add to p_errors [4, B * Hkv, T] what the nearest centroids of one group leave of a vector less a prototype of p_few."""
    i_page = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    i_b = i_head // heads
    i_h = i_head % heads
    o_t = tl.arange(0, 64)
    t = i_page * 64 + o_t[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < DSUB
    p_row = p_x + i_b * stride_b + i_h * stride_h + t * stride_t
    table = i_h * 3 * D
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + i_head) * num_pages * 64 + i_page * 64 + o_t
    p_tried = p_prototypes + (i_h * K + tl.load(p_few + place)[:, None]) * D
    error = tl.load(p_errors + place)
    turn = i_b * angle_row + t
    for m in range(M):
        o_c = first_channel + m * DSUB + o_d
        point = load_points(
            p_row, p_places + table, p_factors + table, p_cos, p_sin, turn, o_c, m_d, stride_d, num_pairs, TURN, D
        )
        point -= tl.load(p_tried + o_c, mask=m_d, other=0.0).to(tl.float32)
        lines = p_centroids + (i_h * M + m) * ((1 << NBITS) * DSUB)
        _, distance = nearest_code(point, lines, o_d, m_d, NBITS, DSUB, BK)
        error += distance
    tl.store(p_errors + place, error)
