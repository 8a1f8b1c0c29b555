"""The kernels of encoding, which `gpu.encode` launches.

Points to code space, nearest centroids on the tensor cores, prototypes, packed codes.
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


TOKENS = tl.constexpr(32)  # that a warp looks at together


@triton.jit
def point_tile(
    p_points,
    t,
    num_tokens,
    p_prototypes,
    p_chosen,
    step: tl.constexpr,
    DSUB: tl.constexpr,
    D: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """Load four channels [2, 2, 8, 4] of 32 tokens from `t` on, less those of prototypes where they are CHOSEN; 0 beyond DSUB.

    `p_points` [DSUB, T] and `p_prototypes` [K, D] begin with the subspace's first channel, `p_chosen` [T] with the first token.
    """
    token = tl.arange(0, 2)[:, None, None, None] * 16 + tl.arange(0, 2)[None, :, None, None] * 8
    token = t + token + tl.arange(0, 8)[None, None, :, None]
    channel = 4 * step + tl.arange(0, 4)[None, None, None, :]
    # The last dimensions are a warp's lanes, says the hint (see `page_kernels`), and that nothing is known of alignment: or a
    # lane would take for neighbours what lies side by side, other tokens.
    p_point = tl.multiple_of(tl.max_contiguous(p_points + channel * num_tokens + token, [1, 1, 2, 4]), [1, 1, 1, 1])
    point = tl.load(p_point, mask=channel < DSUB, other=0.0)
    if CHOSEN:
        row = tl.load(p_chosen + token)
        p_prototype = tl.multiple_of(tl.max_contiguous(p_prototypes + row * D + channel, [1, 1, 2, 4]), [1, 1, 1, 1])
        point -= tl.load(p_prototype, mask=channel < DSUB, other=0.0).to(tl.float32)
    return point


@triton.jit
def point_operand(point, WIDTH: tl.constexpr):
    """Make a `point_tile` the left operand [32, 16] of a product with `line_operand`."""
    point = tl.minimum(tl.maximum(point, -60000.0), 60000.0)  # float16 ends there, which is far outside of every table
    high = point.to(tl.float16)
    low = (point - high.to(tl.float32)).to(tl.float16)
    tile = tl.join(tl.join(high, low), tl.join(high, tl.full(high.shape, 1.0, tl.float16)))  # [2, 2, 8, 4, 2, 2]
    tile = tl.permute(tile, (0, 1, 2, 5, 3, 4) if WIDTH == 2 else (0, 1, 2, 3, 5, 4))
    return tl.reshape(tile, (TOKENS, 16))


@triton.jit
def tile_operands(
    p_points,
    t,
    num_tokens,
    p_prototypes,
    p_chosen,
    shrink,
    p_shift,
    D: tl.constexpr,
    DSUB: tl.constexpr,
    CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the operands of 32 points, four channels each; `shrink` and `p_shift` [DSUB] are `lines_kernel`'s."""
    operands = ()
    for step in tl.static_range((DSUB + 3) // 4):
        point = point_tile(p_points, t, num_tokens, p_prototypes, p_chosen, step, DSUB, D, CHOSEN)
        channel = 4 * step + tl.arange(0, 4)[None, None, None, :]
        shift = tl.load(p_shift + channel, mask=channel < DSUB, other=0.0)
        operands = operands + (point_operand(shrink * point - shift, WIDTH),)
    return operands


@triton.jit
def line_operand(p_lines, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Load `CHUNK` lines as the right operand [16, CHUNK] of a product."""
    o_i, o_g = tl.arange(0, CHUNK // 16)[:, None, None, None], tl.arange(0, 8)[None, :, None, None]
    o_q, o_place = tl.arange(0, 4)[None, None, :, None], tl.arange(0, 8)[None, None, None, :]
    p_line = tl.max_contiguous(p_lines + o_i * 256 + o_g * 32 + o_q * 8 + o_place, [1, 2, 4, 8])
    tile = tl.reshape(tl.load(p_line), (CHUNK // 16, 8, 4, 2, 2, 2))
    tile = tl.permute(tile, (4, 2, 5, 0, 3, 1) if WIDTH == 2 else (2, 4, 5, 0, 3, 1))
    return tl.reshape(tile, (16, CHUNK))


@triton.jit
def larger(best, operands, p_lines, STEPS: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return `best` or the largest scores [32, 8] of a chunk of lines, as int32: in column ``i`` of those ``8 j + i``."""
    scores = tl.dot(operands[0], line_operand(p_lines, CHUNK, WIDTH))
    for step in tl.static_range(1, STEPS):
        scores = tl.dot(operands[step], line_operand(p_lines + step * (LINES * 16), CHUNK, WIDTH), scores)
    return tl.maximum(tl.max(tl.reshape(scores.to(tl.int32, bitcast=True), (TOKENS, CHUNK // 8, 8)), 1), best)


@triton.jit
def nearest_lines(operands, p_lines, STEPS: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return for 32 points, [32] int32, the first of the ``CHUNK / 8`` lines, eight apart, of which one is the nearest."""
    best = tl.full((TOKENS, 8), -1, tl.int32)
    first = tl.zeros((TOKENS, 8), tl.int32)
    if LINES <= 4 * CHUNK:
        for chunk in tl.static_range(LINES // CHUNK):
            largest = larger(best, operands, p_lines + chunk * (CHUNK * 16), STEPS, LINES, CHUNK, WIDTH)
            first = tl.where(largest > best, chunk * CHUNK, first)
            best = largest
    else:
        for chunk in range(LINES // CHUNK):
            largest = larger(best, operands, p_lines + chunk * (CHUNK * 16), STEPS, LINES, CHUNK, WIDTH)
            first = tl.where(largest > best, chunk * CHUNK, first)
            best = largest
    largest = tl.max(best, 1)[:, None]
    return tl.min(tl.where(best == largest, first + tl.arange(0, 8)[None, :], LINES), 1)


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
    ROTATED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Store 64 tokens of `BD` code-space channels of one head; p_points [B * Hkv, D, T] fp32.

    `p_x` [B, Hkv, T, D] has any strides; a code-space channel is made of at most two of its channels
    (`pqkv_kernels.format.tables`), rotated back by p_cos and p_sin [B, T, pairs], whose rows are `angle_row` tokens apart.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_b = i_head // heads
    table = i_head % heads * (3 * D)
    t = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    o_d = tl.program_id(2) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    p_row = p_x + i_b * stride_b + i_head % heads * stride_h + t * stride_t
    own = tl.load(p_places + table + o_d, mask=m_d, other=0)
    # Lanes go along channels, says the hint (see `page_kernels`): they lie together in memory, or nearly so.
    p_own = tl.multiple_of(tl.max_contiguous(p_row + own * stride_d, [1, BD]), [1, 1])
    point = tl.load(p_own, mask=m_d, other=0.0).to(tl.float32)
    factor = tl.load(p_factors + table + D + o_d, mask=m_d, other=0.0)
    if ROTATED:
        partner = tl.load(p_places + table + D + o_d, mask=m_d, other=0)
        p_partner = tl.multiple_of(tl.max_contiguous(p_row + partner * stride_d, [1, BD]), [1, 1])
        other = tl.load(p_partner, mask=m_d, other=0.0).to(tl.float32)
        pair = tl.load(p_places + table + 2 * D + o_d, mask=m_d, other=0)
        m_rotated = m_d & (pair < num_pairs)
        at = (i_b * angle_row + t) * num_pairs + pair
        p_cos = tl.multiple_of(tl.max_contiguous(p_cos + at, [1, BD]), [1, 1])
        p_sin = tl.multiple_of(tl.max_contiguous(p_sin + at, [1, BD]), [1, 1])
        cos = tl.load(p_cos, mask=m_rotated, other=1.0)
        sin = tl.load(p_sin, mask=m_rotated, other=0.0) * tl.load(p_factors + table + o_d, mask=m_d, other=0.0)
        point, other = point * cos + other * sin, other * cos - point * sin
        point = point * factor + other * tl.load(p_factors + table + 2 * D + o_d, mask=m_d, other=0.0)
    else:
        point = point * factor
    tl.store(p_points + (i_head * D + o_d) * num_tokens + t, point, mask=m_d)


@triton.jit
def pack_code(page, code, first, NBITS: tl.constexpr):
    """Store the lowest `NBITS` bits of 32 codes, of tokens from `first` on, at `page`, in the parts of `layout.code_parts`."""
    o_t = first + tl.arange(0, TOKENS)
    if NBITS >= 8:
        tl.store(page + o_t, (code & 255).to(tl.uint8))
    low: tl.constexpr = 8 if NBITS >= 8 else 0
    if (NBITS & 4) != 0:
        four = ((code >> low) & 15) << (4 * (o_t % 2))
        tl.store(page + 8 * low + first // 2 + tl.arange(0, 16), tl.sum(tl.reshape(four, (16, 2)), 1).to(tl.uint8))
    if (NBITS & 2) != 0:
        two = ((code >> (low + (NBITS & 4))) & 3) << (2 * (o_t % 4))
        p_two = page + 8 * (low + (NBITS & 4)) + first // 4 + tl.arange(0, 8)
        tl.store(p_two, tl.sum(tl.reshape(two, (8, 4)), 1).to(tl.uint8))
    if (NBITS & 1) != 0:
        one = ((code >> (NBITS - 1)) & 1) << (o_t % 8)
        tl.store(page + 8 * (NBITS - 1) + first // 8 + tl.arange(0, 4), tl.sum(tl.reshape(one, (4, 8)), 1).to(tl.uint8))


@triton.jit
def coordinate(p_points, t, num_tokens, p_prototypes, p_chosen, i: tl.constexpr, D: tl.constexpr, CHOSEN: tl.constexpr):
    """Load channel `i` of the points `t` [32], as `point_tile` does."""
    point = tl.load(p_points + i * num_tokens + t)
    if CHOSEN:
        point -= tl.load(p_prototypes + tl.load(p_chosen + t) * D + i).to(tl.float32)
    return point


@triton.jit
def nearest_code(
    p_points,
    t,
    num_tokens,
    p_prototypes,
    p_chosen,
    p_centroids,
    first,
    D: tl.constexpr,
    DSUB: tl.constexpr,
    CHOSEN: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the nearest of the ``CHUNK / 8`` centroids from `first` [32] on, eight apart: codes and squared distances."""
    p_first = p_centroids + first * DSUB
    gaps = ()
    for _ in tl.static_range(CHUNK // 8):
        gaps = gaps + (tl.zeros((TOKENS,), tl.float32),)
    for i in tl.static_range(DSUB):
        point = coordinate(p_points, t, num_tokens, p_prototypes, p_chosen, i, D, CHOSEN)
        nearer = ()
        for j in tl.static_range(CHUNK // 8):
            p_centroid = p_first + (8 * j * DSUB + i)
            if K >= 16:
                gap = point - tl.load(p_centroid).to(tl.float32)
            else:  # there are lines beyond the table
                gap = point - tl.load(p_centroid, mask=first + 8 * j < K, other=float("inf")).to(tl.float32)
            nearer = nearer + (gaps[j] + gap * gap,)
        gaps = nearer
    best = tl.full((TOKENS,), float("inf"), tl.float32)
    code = tl.zeros((TOKENS,), tl.int32)
    for j in tl.static_range(CHUNK // 8):
        code = tl.where(gaps[j] < best, first + 8 * j, code)
        best = tl.minimum(best, gaps[j])
    return code, best


@triton.jit
def encode_kernel(
    p_points,
    p_prototypes,
    p_chosen,
    p_centroids,
    p_lines,
    p_shrink,
    p_shift,
    p_pages,
    heads,
    num_tokens,
    tiles,
    first_channel,
    row_bytes,
    page_bytes,
    offset_0,
    offset_1,
    offset_2,
    offset_3,
    LAST: tl.constexpr,
    CHOSEN: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    CHUNK: tl.constexpr,
    DSUB: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Encode one subspace of `tiles` times 32 tokens of one head; p_pages is [B, P, Hkv, page_bytes], rows `row_bytes` apart.

    Of p_points [B * Hkv, D, T], less one of CHOSEN prototypes where there are any: p_chosen [B * Hkv, T]. Unless this is the
    LAST stage, points become what the code leaves of them. A code of log2(K) bits is that of up to four stages taken together,
    of N0 bits (the lowest) to N3; 0: there is none.
    """
    i_m = tl.program_id(1).to(tl.int64)
    i_head = tl.program_id(2).to(tl.int64)
    i_table = i_head % heads * tl.num_programs(1) + i_m
    channel = first_channel + i_m * DSUB
    points = p_points + (i_head * D + channel) * num_tokens
    prototypes = p_prototypes + i_head % heads * CHOSEN * D + channel
    chosen = p_chosen + i_head * num_tokens
    centroids = p_centroids + i_table * (K * DSUB)
    STEPS: tl.constexpr = (DSUB + 3) // 4
    lines = p_lines + i_table * (STEPS * LINES * 16)
    shrink, shift = tl.load(p_shrink + i_table), p_shift + i_table * DSUB
    row = p_pages + i_head // heads * row_bytes + i_head % heads * page_bytes
    first_tile = tl.program_id(0) * tiles
    for i_tile in range(first_tile, min(first_tile + tiles, num_tokens // TOKENS)):
        start = i_tile * TOKENS
        operands = tile_operands(points, start, num_tokens, prototypes, chosen, shrink, shift, D, DSUB, CHOSEN, WIDTH)
        first = nearest_lines(operands, lines, STEPS, LINES, CHUNK, WIDTH)
        t = start + tl.arange(0, TOKENS)
        code, _ = nearest_code(points, t, num_tokens, prototypes, chosen, centroids, first, D, DSUB, CHOSEN, K, CHUNK)
        if not LAST:
            for i in tl.static_range(DSUB):
                rest = coordinate(points, t, num_tokens, prototypes, chosen, i, D, CHOSEN)
                tl.store(points + i * num_tokens + t, rest - tl.load(centroids + code * DSUB + i).to(tl.float32))
        page = row + (start // 64).to(tl.int64) * (heads * page_bytes)
        pack_code(page + offset_0 + i_m * (8 * N0), code, start % 64, N0)
        if N1:
            pack_code(page + offset_1 + i_m * (8 * N1), code >> N0, start % 64, N1)
        if N2:
            pack_code(page + offset_2 + i_m * (8 * N2), code >> (N0 + N1), start % 64, N2)
        if N3:
            pack_code(page + offset_3 + i_m * (8 * N3), code >> (N0 + N1 + N2), start % 64, N3)


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
    distances are compared as integers (the scores above) whose lowest bits, up to eight of 24, number the steps: of prototypes
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
        prototype = (key & (COUNT - 1)) * COLUMNS + column
        # Where there are fewer prototypes, the first one is tried again: that changes nothing.
        prototype = tl.where(key == FARTHEST, nearest, prototype)
        if i == 0:
            nearest = prototype
        tl.store(row + i * tl.num_programs(1).to(tl.int64) * num_tokens, prototype)
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
