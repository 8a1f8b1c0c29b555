"""The kernels that find the nearest prototypes of vectors, and what parts leave over of each. `triton_encode` launches them."""

import triton
import triton.language as tl

from pqkv_kernels.triton_codes import nearest_code
from pqkv_kernels.triton_scores import TOKENS, nearest_lines, tile_operands

COLUMNS = tl.constexpr(16)  # prototypes that a step of `few_kernel` looks at
FARTHEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def sorted_in(key, k_0, k_1, k_2, k_3):
    """Return the least four of five keys, of which four are sorted."""
    k_0, key = tl.minimum(k_0, key), tl.maximum(k_0, key)
    k_1, key = tl.minimum(k_1, key), tl.maximum(k_1, key)
    k_2, key = tl.minimum(k_2, key), tl.maximum(k_2, key)
    return k_0, k_1, k_2, tl.minimum(k_3, key)


@triton.jit
def split_in_two(x):
    """Return two float16 whose sum is as exact as fp32 where `x` is near one."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def few_kernel(
    p_points,
    p_prototypes,
    p_squares,
    p_shrink,
    p_few,
    heads,
    num_tokens,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Find the four prototypes nearest to each of 64 points, nearest first; p_few [4, B * Hkv, T] int32.

    p_points [B * Hkv, D, T] fp32, p_prototypes [Hkv, K, D] float16, or fp32 where WIDE, p_shrink [Hkv] powers of two by which
    points are multiplied, so that float16 holds them, and p_squares [Hkv, K] the squares of prototypes times it. Squared
    distances are compared as integers (`triton_scores`) whose lowest bits, up to eight of 24, number the steps: of prototypes
    that differ by less either may be tried.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_h = i_head % heads
    t = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    o_d = tl.arange(0, BD)
    p_point = p_points + (i_head * D + o_d[None, :]) * num_tokens + t[:, None]
    point = tl.load(p_point, mask=o_d[None, :] < D, other=0.0)
    shrink = tl.load(p_shrink + i_h)
    square = shrink * tl.sum(point * point, 1)[:, None]
    high, low = split_in_two(tl.minimum(tl.maximum(shrink * point, -60000.0), 60000.0))
    STEPS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    COUNT: tl.constexpr = triton.next_power_of_2(STEPS)
    k_0 = tl.full((64, COLUMNS), FARTHEST, tl.int32)
    k_1, k_2, k_3 = k_0, k_0, k_0
    for step in range(STEPS):
        o_k = step * COLUMNS + tl.arange(0, COLUMNS)
        m_c = (o_d[:, None] < D) & (o_k[None, :] < K)
        c = tl.load(p_prototypes + (i_h * K + o_k[None, :]) * D + o_d[:, None], mask=m_c, other=0.0)
        if WIDE:
            c_high, c_low = split_in_two(shrink * c)
            product = tl.dot(high, c_high, tl.dot(low, c_high, tl.dot(high, c_low))) / shrink
        else:
            product = tl.dot(high, c, tl.dot(low, c))
        gap = square + (tl.load(p_squares + i_h * K + o_k, mask=o_k < K, other=0.0)[None, :] - 2 * product)
        key = gap.to(tl.int32, bitcast=True) & -COUNT | step
        key = tl.where(o_k[None, :] < K, key, FARTHEST)
        k_0, k_1, k_2, k_3 = sorted_in(key, k_0, k_1, k_2, k_3)
    columns = tl.arange(0, COLUMNS)[None, :]
    row = p_few + i_head * num_tokens + t
    nearest = tl.zeros((64,), tl.int32)
    for i in tl.static_range(4):
        key = tl.min(k_0, 1)
        column = tl.min(tl.where(k_0 == key[:, None], columns, COLUMNS - 1), 1)
        found = (key & (COUNT - 1)) * COLUMNS + column
        # Where there are fewer prototypes, the first one is tried again: that changes nothing.
        found = tl.where(key == FARTHEST, nearest, found)
        if i == 0:
            nearest = found
        tl.store(row + i * tl.num_programs(1).to(tl.int64) * num_tokens, found)
        out = columns == column[:, None]
        k_0, k_1, k_2, k_3 = tl.where(out, k_1, k_0), tl.where(out, k_2, k_1), tl.where(out, k_3, k_2), k_3


@triton.jit
def error_kernel(
    p_points,
    p_prototypes,
    p_few,
    p_centroids,
    p_lines,
    p_shrink,
    p_shift,
    p_errors,
    heads,
    num_tokens,
    tiles,
    tried,
    first_channel,
    CHOSEN: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    CHUNK: tl.constexpr,
    DSUB: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store what the nearest centroids of one subspace leave of `tiles` times 32 points less each of the prototypes tried.

    p_errors [M, tried, B * Hkv, T] fp32, p_few [tried, B * Hkv, T]; other arguments as of `encode_kernel`.
    """
    i_m = tl.program_id(1).to(tl.int64)
    i_head = tl.program_id(2).to(tl.int64)
    i_table = i_head % heads * tl.num_programs(1) + i_m
    channel = first_channel + i_m * DSUB
    points = p_points + (i_head * D + channel) * num_tokens
    prototypes = p_prototypes + i_head % heads * CHOSEN * D + channel
    STEPS: tl.constexpr = (DSUB + 3) // 4
    centroids = p_centroids + i_table * (K * DSUB)
    lines = p_lines + i_table * (STEPS * LINES * 16)
    shrink, shift = tl.load(p_shrink + i_table), p_shift + i_table * DSUB
    first_tile = tl.program_id(0) * tiles
    for i_tile in range(first_tile, min(first_tile + tiles, num_tokens // TOKENS)):
        start = i_tile * TOKENS
        for i in range(tried):
            i_row = (i * tl.num_programs(2) + i_head) * num_tokens
            operands = tile_operands(
                points, start, num_tokens, prototypes, p_few + i_row, shrink, shift, D, DSUB, CHOSEN, WIDTH
            )
            first = nearest_lines(operands, lines, STEPS, LINES, CHUNK, WIDTH)
            t = start + tl.arange(0, TOKENS)
            _, gap = nearest_code(points, t, num_tokens, prototypes, p_few + i_row, centroids, first, D, DSUB, CHOSEN, K, CHUNK)
            p_error = p_errors + i_m * tried * tl.num_programs(2) * num_tokens + i_row + t
            tl.store(p_error, gap)
