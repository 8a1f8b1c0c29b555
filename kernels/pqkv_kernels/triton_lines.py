"""The kernel that makes centroids operands of products on the tensor cores. `triton_encode` launches it.

The nearest centroid of ``x`` has the largest score ``2 x . c - c . c``. In float16 that is as exact as in fp32 where numbers
are sums of two: ``x . c`` is ``xh . ch + xl . ch + xh . cl``, and what is missing is lost in fp32 too. So a channel takes three
places along the sum, and four channels, each with a fourth place, fill the sixteen of one product. In the fourth places lies
what is added for the centroid, where the point has ones.

Centroids, and points that meet them, are moved by the table's mean and divided by a power of two that no channel then exceeds.
So squares are at most the number of channels, and as centroids lie on all sides of zero, one has a product with the point that
is not negative: with a number added that is above all squares, the largest score is positive (`triton_scores` says what for).
"""

import triton
import triton.language as tl

LEAST_LINES = tl.constexpr(16)  # a product on tensor cores takes no fewer; those that are missing have no score


@triton.jit
def some_channels(p_table, start, o_d, K: tl.constexpr, DSUB: tl.constexpr, BK: tl.constexpr):
    """Load the channels `o_d` [1, W] of `BK` centroids of `p_table` [K, DSUB] from `start` on, fp32; 0 where there are none."""
    o_k = start + tl.arange(0, BK)[:, None]
    return tl.load(p_table + o_k * DSUB + o_d, mask=(o_k < K) & (o_d < DSUB), other=0.0).to(tl.float32)


@triton.jit
def mean_channels(p_table, o_d, K: tl.constexpr, DSUB: tl.constexpr, BK: tl.constexpr):
    """Return the mean [1, W] of the channels `o_d`."""
    total = tl.zeros(o_d.shape, tl.float32)
    for start in range(0, K, BK):
        total += tl.sum(some_channels(p_table, start, o_d, K, DSUB, BK), 0)[None, :]
    return total / K


@triton.jit
def lines_kernel(
    p_centroids, p_lines, p_shrink, p_shift, K: tl.constexpr, DSUB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr
):
    """Store the lines of one table of p_centroids [S, K, DSUB], and how points that meet them are scaled and moved.

    p_lines [S, ceil(DSUB / 4), lines / 16, 8, 4, 2, 4] float16: lines are at least 16, and line ``16 i + 8 t + g`` lies at
    ``[i, g, channel, t]``. The last dimension are a channel's places: 2 ch twice, 2 cl, the fourth. Lines are met by
    ``shrink * x - shift`` with p_shrink [S] and p_shift [S, DSUB] fp32.
    """
    i_s = tl.program_id(0).to(tl.int64)
    table = p_centroids + i_s * (K * DSUB)
    o_d, q = tl.arange(0, BD)[None, :], tl.arange(0, 4)[None, :]
    mean = mean_channels(table, o_d, K, DSUB, BK)
    largest = 0.0
    for start in range(0, K, BK):
        m_c = (start + tl.arange(0, BK)[:, None] < K) & (o_d < DSUB)
        gap = tl.where(m_c, tl.abs(some_channels(table, start, o_d, K, DSUB, BK) - mean), 0.0)
        largest = tl.maximum(largest, tl.max(tl.max(gap, 1), 0))
    shrink = tl.exp2(-tl.ceil(tl.log2(tl.minimum(tl.maximum(largest, 1e-30), 1e30))))
    tl.store(p_shrink + i_s, shrink)
    tl.store(p_shift + i_s * DSUB + o_d, shrink * mean, mask=o_d < DSUB)
    LINES: tl.constexpr = K if K > LEAST_LINES else LEAST_LINES
    STEPS: tl.constexpr = (DSUB + 3) // 4
    for step in tl.static_range(STEPS):
        own_mean = mean_channels(table, 4 * step + q, K, DSUB, BK)
        for start in range(0, LINES, BK):
            o_k = start + tl.arange(0, BK)[:, None]
            line = 2 * shrink * (some_channels(table, start, 4 * step + q, K, DSUB, BK) - own_mean)
            high = line.to(tl.float16)
            p_line = p_lines + (i_s * STEPS + step) * (LINES * 16) + o_k // 16 * 256 + o_k % 8 * 32 + q * 8 + o_k // 8 % 2 * 4
            tl.store(p_line, high, mask=o_k < LINES)
            tl.store(p_line + 1, high, mask=o_k < LINES)
            tl.store(p_line + 2, (line - high.to(tl.float32)).to(tl.float16), mask=o_k < LINES)
            fourth = tl.zeros((BK, 4), tl.float16)
            if step == 0:
                c = shrink * (some_channels(table, start, o_d, K, DSUB, BK) - mean)
                added = DSUB + 1 - tl.sum(tl.where(o_d < DSUB, c * c, 0.0), 1)[:, None]
                high = added.to(tl.float16)
                low = (added - high.to(tl.float32)).to(tl.float16)
                fourth = tl.where(q == 0, tl.where(o_k < K, high, float("-inf")), tl.where(q == 1, low, 0.0))
            tl.store(p_line + 3, fourth, mask=o_k < LINES)
