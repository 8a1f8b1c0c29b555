"""Queries that meet the keys of one page, as operands of products on the tensor cores. Knows no codes; see `triton_turns`.

Their tiles, [groups of planes, groups of queries, 8, 4], stand where the operands want them, as those of `triton_planes` do.
"""

import triton
import triton.language as tl


@triton.jit
def query_scales(p_query, m_n, D2: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr):
    """Return powers of two [1, BN] that no plane of a query exceeds, so that float16 holds them, and their inverses."""
    largest = tl.full(m_n.shape, 1e-37, tl.float32)
    for chunk in tl.static_range(BP // CHUNK):
        i = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
        q_x = tl.load(p_query + i, mask=m_n & (i < D2), other=0.0)
        q_y = tl.load(p_query + D2 + i, mask=m_n & (i < D2), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(q_x), tl.abs(q_y)), 0)[None, :])
    exponent = tl.minimum(tl.ceil(tl.log2(largest)), 126.0)
    return tl.exp2(exponent), tl.exp2(-exponent)


@triton.jit
def query_operand(a_x, a_y, b_x, b_y, CHUNK: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Make tiles [G, BN / 8, 8, 4] of even planes (`a`) and of the next (`b`) the right operand, see `key_operand`."""
    tile = tl.join(tl.join(a_x, b_x), tl.join(a_y, b_y))  # [G, BN / 8, 8, 4, b, y]
    tile = tl.permute(tile, (0, 3, 4, 5, 1, 2) if WIDTH == 4 else (0, 4, 3, 5, 1, 2))
    return tl.reshape(tile, (2 * CHUNK, BN))


@triton.jit
def turned_query(
    p_query,
    n,
    stop,
    shrink,
    p_pairs,
    p_base_cos,
    p_base_sin,
    num_pairs,
    plane,
    TURN: tl.constexpr,
    WIDE: tl.constexpr,
    D2: tl.constexpr,
):
    """Return both components of the planes `plane` of the queries `n` before `stop`, see `turned_queries`."""
    m_q = (n < stop) & (plane < D2)
    p_x = tl.max_contiguous(p_query + (n * (2 * D2) + plane), [1, 1, 2, 4])
    q_x = tl.load(p_x, mask=m_q, other=0.0) * shrink
    q_y = tl.load(tl.max_contiguous(p_x + D2, [1, 1, 2, 4]), mask=m_q, other=0.0) * shrink
    if TURN == 1:
        pair = tl.load(p_pairs + plane)
        cos = tl.load(p_base_cos + pair, mask=pair < num_pairs, other=1.0)
        sin = tl.load(p_base_sin + pair, mask=pair < num_pairs, other=0.0)
        q_x, q_y = q_x * cos + q_y * sin, q_y * cos - q_x * sin
    kind = tl.float32 if WIDE else tl.float16
    return q_x.to(kind), q_y.to(kind)


@triton.jit
def turned_queries(
    p_query,
    first,
    stop,
    shrink,
    p_pairs,
    p_base_cos,
    p_base_sin,
    num_pairs,
    chunk: tl.constexpr,
    TURN: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    D2: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Return queries [2 CHUNK, BN] times `shrink`, turned back by the page's base (TURN 1), and those a quarter further."""
    a = chunk * CHUNK + tl.arange(0, CHUNK // 8)[:, None, None, None] * 8 + tl.arange(0, 4)[None, None, None, :] * 2
    n = first + tl.arange(0, BN // 8)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    shrink = tl.reshape(shrink, (1, BN // 8, 8, 1))
    a_x, a_y = turned_query(p_query, n, stop, shrink, p_pairs, p_base_cos, p_base_sin, num_pairs, a, TURN, WIDE, D2)
    b_x, b_y = turned_query(p_query, n, stop, shrink, p_pairs, p_base_cos, p_base_sin, num_pairs, a + 1, TURN, WIDE, D2)
    across = query_operand(a_x, a_y, b_x, b_y, CHUNK, BN, WIDTH)
    return across, query_operand(a_y, -a_x, b_y, -b_x, CHUNK, BN, WIDTH)
