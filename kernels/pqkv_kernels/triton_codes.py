"""The kernel that finds and packs the codes of one subspace. `triton_encode` launches it.

Products on tensor cores leave few centroids (`triton_scores`), of which fp32 takes the nearest.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_scores import TOKENS, nearest_lines, tile_operands


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
